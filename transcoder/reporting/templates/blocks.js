// One function a kind of block; what they draw is decided in transcoder/reporting/sections.
const latentLink = (id) => {
  const link = set(make("a", "chip", String(id)), { href: `#latent-${id}`, "aria-label": `Latent ${id}` });
  link.addEventListener("click", (e) => { e.preventDefault(); openLatent(id); });
  return link;
};
const pill = (words, look) => make("span", `pill ${look}`, words);
const cell = (value) => {
  if (value === null || typeof value !== "object") return [String(value ?? "–")];
  const parts = [];
  if (value.pill !== undefined) parts.push(pill(value.text, value.pill));
  else if (value.text !== undefined) parts.push(value.text);
  if (value.note) parts.push(make("small", "", value.note));
  return parts;
};
const plainTable = (head, rows, numeric, caption) => {
  const right = new Set(numeric);
  const line = (tag, values) => make("tr", "", ...values.map((value, n) => {
    const node = make(tag, right.has(n) ? "n" : "", ...cell(value));
    if (tag === "th") node.scope = "col";
    return node;
  }));
  const table = make("table", "", make("thead", "", line("th", head)), make("tbody", "", ...rows.map((row) => line("td", row))));
  if (caption) table.prepend(make("caption", "unseen", caption));
  return set(make("div", "scroll", table), { tabindex: "0", role: "region", "aria-label": caption || "Table" });
};

const blocks = {
  text: (b) => (b.look === "code" ? make("pre", "", b.text) : make("p", b.look, b.text)),
  heading: (b) => make("h3", "", b.text),
  tiles: (b) => make("dl", "tiles", ...b.rows.map(([name, value, meaning]) => {
    const tile = make("div", "tile", make("dt", "", name), make("dd", "", value));
    if (meaning) tile.title = meaning;
    return tile;
  })),
  table: (b) => plainTable(b.head, b.rows, b.numeric, b.caption),
  panel: (b) => make("div", `panel ${b.look}`, make("h3", "", b.title), ...b.blocks.map(block)),
  columns: (b) => make("div", "columns", ...b.parts.map((part) => make("div", "", ...part.map(block)))),
  charts: (b) => make("div", "charts", ...b.charts.map(chartFigure)),
  chart: chartFigure,
  details: (b) => {
    const box = make("details", "", make("summary", "", b.summary));
    box.addEventListener("toggle", () => { if (box.open && box.children.length === 1) box.append(...b.blocks.map(block)); });
    return box;
  },
  facts: (b) => make("dl", "what", ...b.rows.map(([name, value]) => make("div", "", make("dt", "", name), make("dd", "", value)))),
  list: (b) => make("ul", "", ...b.rows.map(([what, why]) => make("li", "", make("b", "", what), ` ${why}`))),
  bars: (b) => {
    const most = Math.max(...b.rows.map(([, value]) => value ?? 0), 1e-12);
    return make("div", "bars", make("p", "big", b.big), ...b.rows.map(([name, value, words, meaning], n) => {
      const bar = set(make("i", ""), { style: `width: ${((100 * Math.max(0, value ?? 0)) / most).toFixed(1)}%` });
      return set(make("div", n ? "bar-row" : "bar-row own", make("span", "", name), make("span", "track", bar), make("b", "", words)), { title: meaning });
    }));
  },
  chips: (b) => make("p", "chips", `${b.text} `, ...b.latents.flatMap((id) => [latentLink(id), " "]), b.rest),
  groups: (b) => make("div", "", make("h3", "", b.title), make("p", "note", b.text), make("p", "groups", ...b.rows.map(([ids, more]) =>
    make("span", "group", ...ids.map(latentLink), ...(more ? [make("small", "", `and ${more} more`)] : []))))),
  pairs: (b) => pairsBlock(b),
  latents: (b) => latentsBlock(b),
};
const block = (b) => {
  const node = blocks[b.is](b);
  node.block = b;
  return node;
};

// What stays as it was keeps its node, and with it its state: an open pair, a search, a scroll position.
const renew = (node, fresh) => {
  const old = node.block;
  if (JSON.stringify(old) === JSON.stringify(fresh)) return node;
  if (old.is === fresh.is && node.update && old.kind === fresh.kind) {
    node.update(fresh);
    node.block = fresh;
    return node;
  }
  if (old.is === fresh.is && fresh.is === "charts" && same(old.charts, fresh.charts)) {
    [...node.children].forEach((child, n) => { if (JSON.stringify(old.charts[n]) !== JSON.stringify(fresh.charts[n])) child.update(fresh.charts[n]); });
    node.block = fresh;
    return node;
  }
  if (old.is === fresh.is && fresh.is === "columns" && old.parts.length === fresh.parts.length) {
    [...node.children].forEach((child, n) => renewAll(child, fresh.parts[n]));
    node.block = fresh;
    return node;
  }
  const next = block(fresh);
  if (node.open) next.open = true;
  return next;
};
const same = (a, b) => a.length === b.length && a.every((chart, n) => chart.title === b[n].title && chart.kind === b[n].kind);
const renewAll = (parent, fresh) => {
  const old = [...parent.children].filter((child) => child.block);
  const next = fresh.map((b, n) => (old[n] && old[n].block.is === b.is ? renew(old[n], b) : block(b)));
  next.forEach((node, n) => { if (node !== old[n]) { if (old[n]) old[n].replaceWith(node); else parent.append(node); } });
  for (const gone of old.slice(next.length)) gone.remove();
};
