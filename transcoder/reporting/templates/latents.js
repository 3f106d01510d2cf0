// Every latent in a list that draws only the rows in view, with the card of the chosen one beside it.
const ROW = 44;
const openIndex = async (b) => {
  const text = await packedText("latent-index");
  const raw = text === null ? { ids: [], count: 0, widths: [], peak: [], density: null, samples: [], group: [], chunk: [], word: [], words: [], partners: {} } : JSON.parse(await unpack(text));
  const ids = raw.ids ?? Array.from({ length: raw.count }, (_, n) => n);
  const places = raw.ids ? new Map(ids.map((id, n) => [id, n])) : null;
  const prefix = (id) => {
    const n = raw.widths.findIndex((w) => id < w);
    return n < 0 ? 0 : n;
  };
  return { ...raw, ids, prefix, prefixes: b.prefixes, lacking: b.lacking ?? {}, place: (id) => (places ? places.get(id) ?? -1 : id < ids.length ? id : -1) };
};

// Contexts, lower case, by place in the index; filled while the page rests, and at once when a search needs it.
const words = { texts: [], ready: null };
const readWords = () => {
  words.ready ??= (async () => {
    const chunks = Math.max(-1, ...store.index.chunk) + 1;
    for (let n = 0; n < chunks; n++) {
      const chunk = await readChunk(n);
      for (const [id, rows, facts] of chunk.cards) {
        const contexts = rows.map((row) => row[5].map((w) => chunk.words[w]).join(""));
        const promoted = [...facts.up, ...facts.down].map(([word]) => word);
        words.texts[store.index.place(id)] = [...contexts, ...promoted].join("\n").toLowerCase();
      }
      await rest();
    }
  })();
  return words.ready;
};

let openLatent = () => {};
const LINK = /^#latent-(\d+)$/;
const latentsBlock = (b) => {
  const count = set(make("span", "count"), { role: "status" });
  const search = set(make("input", ""), { type: "search", id: "latent-search", placeholder: "id, or text in a context", autocomplete: "off", spellcheck: "false" });
  const select = (id, label, options) => {
    const node = set(make("select", ""), { id });
    node.append(...options.map(([value, text]) => { const o = make("option", "", text); o.value = value; return o; }));
    return [node, make("label", "", label, node)];
  };
  const [prefix, prefixLabel] = select("latent-prefix", "Prefix", [["", "all"], ...b.prefixes.map((p, n) => [n, p])]);
  const [density, densityLabel] = select("latent-density", "Density", [["", "any"], ["dead", "0 %"], ["rare", "below 0.1 %"], ["some", "0.1 % to 1 %"], ["often", "1 % to 10 %"], ["dense", "above 10 %"]]);
  const [group, groupLabel] = select("latent-group", "Duplicate group", [["", "all latents"], ["any", "in any group"]]);
  const [order, orderLabel] = select("latent-order", "Order", [["id", "id"], ["peak", "strongest first"], ["density", "densest first"], ["rare", "rarest first"], ["group", "duplicate groups first"]]);
  const tools = set(make("div", "tools", make("label", "grow", "Search", search), prefixLabel, densityLabel, groupLabel, orderLabel, count), { role: "search", "aria-label": "Latents" });
  const spacer = make("div", "spacer");
  const list = set(make("div", "list", spacer), { role: "listbox", tabindex: "0", "aria-label": "Latents", id: "latent-list" });
  const card = set(make("article", "card main-card", make("p", "note", "Choose a latent.")), { "aria-live": "polite", tabindex: "-1", id: "latent-card" });
  const names = set(make("div", "names", make("b", "", "id"), make("span", "peak", "strongest on"), make("span", "num", "density"), make("span", "num", "max")), { "aria-hidden": "true" });
  const box = make("div", "latents", tools, make("div", "browser", make("div", "side", names, list), card));

  let index = null, found = [], chosen = -1, marked = new Set();
  const row = (at) => {
    const n = found[at], id = index.ids[n];
    const node = set(make("div", "row"), { role: "option", id: `row-${id}`, "aria-selected": String(id === chosen), "aria-setsize": found.length, "aria-posinset": at + 1 });
    const word = index.word[n] >= 0 ? make("span", "peak", ...shown(index.words[index.word[n]].replace(/ {3,}/g, " ⋯ "))) : make("span", "peak none", "");
    node.append(make("b", "", String(id)), word, make("span", "num", index.density ? share(index.density[n]) : ""), make("span", "num", figure(index.peak[n])));
    if (index.group[n]) node.append(make("span", "pill warn", `group ${index.group[n]}`));
    node.style.transform = `translateY(${at * ROW}px)`;
    node.addEventListener("click", () => choose(id, false));
    return node;
  };
  const paint = () => {
    if (!index) return;
    spacer.style.height = `${found.length * ROW}px`;
    const from = Math.max(0, Math.floor(list.scrollTop / ROW) - 6);
    const to = Math.min(found.length, Math.ceil((list.scrollTop + list.clientHeight) / ROW) + 6);
    spacer.replaceChildren(...Array.from({ length: Math.max(0, to - from) }, (_, n) => row(from + n)));
    if (!found.length) spacer.append(make("p", "empty", "No latent matches."));
    // A row that is out of view is not there to be named.
    if (list.querySelector(`#row-${chosen}`)) list.setAttribute("aria-activedescendant", `row-${chosen}`);
    else list.removeAttribute("aria-activedescendant");
  };
  list.addEventListener("scroll", () => requestAnimationFrame(paint), { passive: true });
  new ResizeObserver(paint).observe(list);

  const bands = { dead: [-1, 0], rare: [0, 0.001], some: [0.001, 0.01], often: [0.01, 0.1], dense: [0.1, 2] };
  const sorts = {
    id: null, peak: (n) => -(index.peak[n] ?? -1), density: (n) => -(index.density?.[n] ?? 0), rare: (n) => index.density?.[n] || 2, group: (n) => index.group[n] || 1e9,
  };
  // What a search is for, unless it is for an id.
  const sought = () => {
    const text = search.value.trim().toLowerCase();
    return /^\d+$/.test(text) ? "" : text;
  };
  let asked = 0;
  const filter = async () => {
    if (!index) return;
    const mine = ++asked;
    const text = search.value.trim().toLowerCase();
    const digits = /^\d+$/.test(text);
    const band = bands[density.value];
    const wanted = prefix.value === "" ? -1 : Number(prefix.value);
    const group_ = group.value;
    const pass = () => {
      const hits = [];
      for (let n = 0; n < index.ids.length; n++) {
        const id = index.ids[n];
        if (wanted >= 0 && index.prefix(id) !== wanted) continue;
        if (band && !(index.density && index.density[n] > band[0] && index.density[n] <= band[1])) continue;
        if (group_ === "any" ? !index.group[n] : group_ !== "" && index.group[n] !== Number(group_)) continue;
        if (text && !(digits && String(id).startsWith(text)) && !words.texts[n]?.includes(text)) continue;
        hits.push(n);
      }
      const key = sorts[order.value];
      if (key) { const keys = new Map(hits.map((n) => [n, key(n)])); hits.sort((x, y) => keys.get(x) - keys.get(y) || x - y); }
      if (digits) hits.sort((x, y) => (String(index.ids[y]) === text) - (String(index.ids[x]) === text));
      found = hits;
      const total = index.ids.length.toLocaleString("en");
      count.textContent = found.length === index.ids.length ? `${total} latents` : `${found.length.toLocaleString("en")} of ${total} latents`;
      list.scrollTop = 0;
      paint();
    };
    pass();
    if (text && !words.done) {
      count.textContent += ", reading contexts …";
      await readWords();
      words.done = true;
      if (mine === asked) pass();
    }
  };
  let waiting = 0;
  search.addEventListener("input", () => { clearTimeout(waiting); waiting = setTimeout(filter, 90); });
  for (const control of [prefix, density, group, order]) control.addEventListener("change", filter);

  const show = (at) => {
    const top = at * ROW;
    if (top < list.scrollTop) list.scrollTop = top;
    else if (top + ROW > list.scrollTop + list.clientHeight) list.scrollTop = top + ROW - list.clientHeight;
  };
  const choose = (id, jump) => {
    chosen = id;
    const at = found.indexOf(index.place(id));
    if (at >= 0) show(at);
    paint();
    card.dataset.wanted = String(id);
    fillCard(card, id, true, sought());
    try { history.replaceState(null, "", `#latent-${id}`); } catch { /* not everywhere from disk */ }
    if (jump) {
      const target = box.getBoundingClientRect().width < 800 ? card : box;
      target.scrollIntoView({ block: "start" });
      card.focus({ preventScroll: true });
    }
  };
  list.addEventListener("keydown", (e) => {
    const at = index ? found.indexOf(index.place(chosen)) : -1;
    const page = Math.max(1, Math.floor(list.clientHeight / ROW) - 1);
    const next = { ArrowDown: at + 1, ArrowUp: at - 1, PageDown: at + page, PageUp: at - page, Home: 0, End: found.length - 1 }[e.key];
    if (next === undefined || !found.length) return;
    e.preventDefault();
    choose(index.ids[found[Math.max(0, Math.min(found.length - 1, next))]], false);
  });

  const load = async () => {
    index = store.index = await openIndex(b);
    const groups = Math.max(0, ...index.group);
    const options = Array.from({ length: groups }, (_, n) => { const o = make("option", "", `group ${n + 1}`); o.value = n + 1; return o; });
    const wanted = group.value;
    for (const old of [...group.options].slice(2)) old.remove();
    group.append(...options);
    group.value = wanted === "any" || Number(wanted) <= groups ? wanted : "";
    groupLabel.hidden = groups === 0;
    densityLabel.hidden = index.density === null;
    prefixLabel.hidden = index.widths.length < 2;
    for (const option of order.options) option.hidden = (!index.density && ["density", "rare"].includes(option.value)) || (!groups && option.value === "group");
    await filter();
    for (const act of store.waiting ?? []) act();
    store.waiting = null;
    const linked = LINK.exec(location.hash);
    if (chosen >= 0) fillCard(card, chosen, true);
    else if (linked) openLatent(Number(linked[1]));
    else if (found.length) { const first = found.find((n) => index.chunk[n] >= 0) ?? found[0]; chosen = index.ids[first]; card.dataset.wanted = String(chosen); paint(); fillCard(card, chosen, true); }
    (window.requestIdleCallback ?? setTimeout)(() => readWords().then(() => { words.done = true; }));
  };
  openLatent = (id) => {
    if (!index) { (store.waiting ??= []).push(() => openLatent(id)); return; }
    if (index.place(id) >= 0 && !found.includes(index.place(id))) {
      search.value = "";
      for (const control of [prefix, density, group]) control.value = "";
      filter();
    }
    choose(id, true);
  };
  // A link that was pasted into the page's own address, or the browser's way back.
  addEventListener("hashchange", () => {
    const linked = LINK.exec(location.hash);
    if (linked) openLatent(Number(linked[1]));
  });
  store.waiting = [];
  box.update = (fresh) => {
    b = fresh;
    // New cards: what was unpacked is of the former ones.
    store.chunks.clear();
    words.texts = [];
    words.ready = words.done = null;
    load();
  };
  load().catch((error) => card.replaceChildren(make("p", "warn", `The latents cannot be unpacked by this browser: ${error.message}`)));
  return box;
};
