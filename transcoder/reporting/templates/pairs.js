// The pairs, strongest first; a pair opens to both latents' contexts beside each other.
const pairsBlock = (b) => {
  const PAGE = 15;
  const count = set(make("span", "count"), { role: "status" });
  const search = set(make("input", ""), { type: "search", id: "pair-search", inputmode: "numeric", placeholder: "latent id", autocomplete: "off" });
  const flagged = set(make("input", ""), { type: "checkbox", id: "pair-flagged" });
  const duplicate = set(make("input", ""), { type: "checkbox", id: "pair-duplicate" });
  const tools = make("div", "tools", make("label", "", "Latent", search), make("label", "check", flagged, "flagged only"), make("label", "check", duplicate, "duplicates by the merge test only"), count);
  const names = ["Latents", "", "Correlation, 95 % interval", "Cosine", "Jaccard", "Tokens", "Sequences", "Cost of folding", "Merge test", "State"];
  const head = make("tr", "", ...names.map((name, n) => { const th = make("th", n > 2 && n < 8 ? "n" : "", name); th.scope = "col"; return th; }));
  const body = make("tbody", "");
  const table = set(make("table", "", make("caption", "unseen", "Pairs of latents, strongest first"), make("thead", "", head), body), { id: "pairs" });
  const more = button("Show more", "", () => { limit += 4 * PAGE; draw(); });
  const box = make("div", "pairs", tools, set(make("div", "scroll", table), { tabindex: "0", role: "region", "aria-label": "Pairs" }), make("p", "", more));
  let limit = PAGE;
  const open = new Set();

  const interval = (p) => {
    const at = (value) => 4 + 72 * Math.min(1, Math.max(0, (value - 0.5) / 0.5));
    const spoken = p.low === null || p.high === null ? "interval not known" : `${figure(p.low)} to ${figure(p.high)}`;
    const svg = shape("svg", { class: "interval", viewBox: "0 0 80 14", width: 80, height: 14, role: "img", "aria-label": spoken });
    svg.append(shape("line", { class: "base", x1: 4, x2: 76, y1: 7, y2: 7 }));
    if (p.low !== null && p.high !== null) svg.append(shape("line", { class: "ci", x1: at(p.low), x2: at(p.high), y1: 7, y2: 7 }));
    svg.append(shape("circle", { cx: at(p.r), cy: 7, r: 3.2 }));
    return svg;
  };
  const detail = (p) => {
    const sides = make("div", "sides");
    for (const id of [p.i, p.j]) {
      const side = make("article", "card");
      fillCard(side, id, false);
      sides.append(side);
    }
    const words = p.test === "not tested"
      ? "This pair was not put before the merge test: too few held-out tokens fired on it, or it is too far down the list."
      : `Folding the two into one would cost ${p.fold} of what the dropped latent is worth on held-out tokens: ${p.test}.`;
    const td = make("td", "", make("p", "note", words), sides);
    td.colSpan = names.length;
    return make("tr", "detail", td);
  };
  const line = (p) => {
    const key = `${p.i}-${p.j}`;
    const toggle = button("contexts", "open", () => {
      if (open.has(key)) { open.delete(key); tr.nextElementSibling?.remove(); } else { open.add(key); tr.after(detail(p)); }
      toggle.setAttribute("aria-expanded", String(open.has(key)));
    });
    set(toggle, { "aria-expanded": String(open.has(key)), "aria-label": `Contexts of ${p.i} and ${p.j} side by side` });
    const looks = { duplicate: "bad", "no duplicate": "good", "not tested": "" };
    const tr = make("tr", "",
      make("td", "", latentLink(p.i), " ", latentLink(p.j)), make("td", "", toggle), make("td", "r", make("b", "", p.r.toFixed(3)), interval(p)),
      ...p.cells.map((c) => make("td", "n", c)), make("td", "n", p.fold), make("td", "", pill(p.test, looks[p.test])), make("td", "", pill(p.flagged ? "flagged" : "candidate", p.flagged ? "bad" : "")));
    tr.dataset.pair = key;
    return open.has(key) ? [tr, detail(p)] : [tr];
  };
  const draw = () => {
    const id = search.value.trim();
    const rows = b.rows.filter((p) => (id === "" || String(p.i) === id || String(p.j) === id) && (!flagged.checked || p.flagged) && (!duplicate.checked || p.test === "duplicate"));
    body.replaceChildren(...rows.slice(0, limit).flatMap(line));
    if (!rows.length) { const td = make("td", "note", "No pair matches."); td.colSpan = names.length; body.append(make("tr", "", td)); }
    more.hidden = rows.length <= limit;
    count.textContent = rows.length === b.rows.length ? b.shown : `${rows.length} of ${b.rows.length} pairs`;
  };
  search.addEventListener("input", draw);
  flagged.addEventListener("change", draw);
  duplicate.addEventListener("change", draw);
  box.update = (fresh) => { b = fresh; draw(); };
  draw();
  return box;
};
