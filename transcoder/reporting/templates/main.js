const data = JSON.parse($("data").textContent);

const drawHead = (head) => {
  const facts = make("p", "facts", pill(...head.pill), ...head.facts.map((fact) => make("span", "", fact)));
  const top = make("div", "top", make("p", "eyebrow", head.eyebrow), themeButton());
  const parts = [top, make("h1", "", head.title), facts];
  if (head.progress !== null) {
    const bar = set(make("i", ""), { style: `width: ${(100 * head.progress).toFixed(1)}%` });
    parts.push(set(make("div", "progress", bar), { role: "progressbar", "aria-valuenow": Math.round(100 * head.progress), "aria-valuemin": 0, "aria-valuemax": 100, "aria-label": "Steps done" }));
  }
  $("head").replaceChildren(...parts);
};
const licences = () => {
  if (!data.licences.length) return [];
  const box = make("details", "", make("summary", "", "Licences of what is in this page"));
  for (const l of data.licences) box.append(make("p", "note inset", l.name), make("pre", "", l.text));
  return [box];
};

const drawAll = (core) => {
  drawHead(core.header);
  document.title = core.title;
  const main = $("main");
  for (const section of core.sections) {
    let node = $(section.id);
    if (!node) {
      const title = make("h2", "", section.title);
      title.id = `${section.id}-title`;
      node = set(make("section", "", title), { id: section.id, "aria-labelledby": title.id });
      main.append(node);
    }
    try {
      renewAll(node, section.blocks);
    } catch (error) {
      node.append(make("p", "warn", `This section cannot be drawn: ${error}`));
      console.error(error);
    }
  }
};

const navigate = () => {
  const links = new Map(data.sections.map((section) => [section.id, set(make("a", "", section.title), { href: `#${section.id}` })]));
  $("nav").replaceChildren(...links.values());
  const seen = new Map();
  const watch = new IntersectionObserver((entries) => {
    for (const entry of entries) seen.set(entry.target.id, entry.isIntersecting);
    const current = [...links.keys()].find((id) => seen.get(id));
    for (const [id, link] of links) {
      if (id === current) { link.setAttribute("aria-current", "true"); $("nav").scrollLeft = link.offsetLeft - 60; } else link.removeAttribute("aria-current");
    }
  }, { rootMargin: "-20% 0px -70% 0px" });
  for (const section of data.sections) watch.observe($(section.id));
};

const start = () => {
  drawAll(data);
  $("main").append(...licences());
  navigate();
  live();
  document.documentElement.dataset.ready = "1";
};
