// Light and dark: what the system says, until the button says otherwise.
const system = matchMedia("(prefers-color-scheme: dark)");
const remembered = () => {
  try { return localStorage.getItem("transcoder-theme"); } catch { return null; }
};
let theme = remembered();
const setTheme = () => {
  const dark = (theme ?? (system.matches ? "dark" : "light")) === "dark";
  document.documentElement.dataset.theme = dark ? "dark" : "light";
  set($("theme"), { "aria-label": dark ? "Use light colours" : "Use dark colours" }).textContent = dark ? "☀ Light" : "☾ Dark";
  for (const box of document.querySelectorAll("figure.chart")) box.redraw?.();
};
system.addEventListener("change", setTheme);
$("theme").addEventListener("click", () => {
  theme = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
  try { localStorage.setItem("transcoder-theme", theme); } catch { /* a page from disk may not remember */ }
  setTheme();
});

// What the templates rendered becomes alive.
const parts = { "figure.chart": chart, ".pairs": pairs, ".latents": latents, ".brief": briefCard };
const enliven = (root) => {
  for (const [selector, start] of Object.entries(parts)) {
    for (const node of [root, ...root.querySelectorAll(selector)]) if (node.matches(selector)) start(node);
  }
};

const navigate = () => {
  const links = new Map([...$("nav").children].map((link) => [link.hash.slice(1), link]));
  const seen = new Map();
  const watch = new IntersectionObserver((entries) => {
    for (const entry of entries) seen.set(entry.target.id, entry.isIntersecting);
    const current = [...links.keys()].find((id) => seen.get(id));
    for (const [id, link] of links) {
      if (id === current) { link.setAttribute("aria-current", "true"); $("nav").scrollLeft = link.offsetLeft - 60; } else link.removeAttribute("aria-current");
    }
  }, { rootMargin: "-20% 0px -70% 0px" });
  for (const id of links.keys()) watch.observe($(id));
};

// `node` stands in the page; the server sent it as `was` before and sends it as `now`. What stays as it was keeps its node, and
// with it its state: an open pair, a chart, a scroll position.
const ownText = (node) => [...node.childNodes].filter((child) => child.nodeType === Node.TEXT_NODE).map((child) => child.data.trim()).join("");
const renew = (node, was, now) => {
  if (was.isEqualNode(now)) return;
  if (node.renew) {
    node.renew(now);
  } else if (was.children.length && was.children.length === now.children.length && ownText(was) === ownText(now)
    && was.cloneNode().isEqualNode(now.cloneNode()) && !("whole" in now.dataset)) {
    [...node.children].forEach((child, n) => renew(child, was.children[n], now.children[n]));
  } else {
    const fresh = document.importNode(now, true);
    if (node.open) fresh.open = true;
    for (const control of fresh.querySelectorAll("input, select")) {
      const old = node.querySelector(`#${control.id}`);
      control.checked = old?.checked;
      if (old) control.value = old.value;
    }
    node.replaceWith(fresh);
    enliven(fresh);
  }
};

// A page that a watched run serves asks for news every few seconds; one from disk never asks for anything.
const EVERY = 3000;
const live = () => {
  const targets = () => new Map([["head", $("head")], ...[...document.querySelectorAll("section")].map((s) => [s.id, s.querySelector(".body")])]);
  const shown = new Map([...targets()].map(([id, node]) => [id, node.cloneNode(true)]));
  const state = (words, look) => { $("live").className = `pill live ${look}`; $("live").textContent = words; };
  let tag = null;
  const take = (fresh) => {
    document.title = fresh.title;
    store.version = fresh.version;
    for (const [id, node] of targets()) {
      const now = node.cloneNode();
      const text = id === "head" ? fresh.head : fresh.sections.find((s) => s.id === id).html;
      // Rendered by the server, which escapes whatever came from data.
      now.append(...new DOMParser().parseFromString(`<div>${text}</div>`, "text/html").body.firstChild.childNodes);
      renew(node, shown.get(id), now);
      shown.set(id, now);
    }
    say("The report was updated.");
  };
  const ask = async () => {
    if (!document.hidden) {
      try {
        const answer = await fetch("data.json", { headers: tag ? { "If-None-Match": tag } : {}, cache: "no-store" });
        if (answer.status === 200) {
          tag = answer.headers.get("ETag");
          take(await answer.json());
        }
        state("live", "good");
      } catch {
        // The server was stopped, or the machine slept: what is here stays, and the next try may succeed.
        state("not connected", "warn");
      }
    }
    setTimeout(ask, EVERY);
  };
  setTimeout(ask, EVERY);
};
const say = (words) => { $("said").textContent = words; };

const start = () => {
  setTheme();
  if (data.live) live();
  enliven(document.body);
  navigate();
  document.documentElement.dataset.ready = "1";
};
