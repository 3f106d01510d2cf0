// Every latent in a list that draws only the rows in view, with the card of the chosen one next to it.
const ROW = 44;
const EMPTY_INDEX = { ids: [], count: 0, widths: [], peak: [], density: null, samples: [], group: [], chunk: [], word: [], words: [], partners: {}, tokens: 0, interesting: [] };
const openIndex = async (prefixNames) => {
  const text = await packedText("latent-index");
  const raw = text === null ? EMPTY_INDEX : JSON.parse(await unpack(text));
  const ids = raw.ids ?? Array.from({ length: raw.count }, (_, n) => n);
  const places = raw.ids ? new Map(ids.map((id, n) => [id, n])) : null;
  const prefix = (id) => Math.max(0, raw.widths.findIndex((width) => id < width));
  const place = (id) => (places ? places.get(id) ?? -1 : id < ids.length ? id : -1);
  return { ...raw, ids, prefix, prefixName: (id) => prefixNames[prefix(id)] ?? "–", place };
};

// By place in the index: a latent's contexts in lower case, each with where it fires in it, and its promoted and suppressed
// tokens; read while the page rests, and at once when a search needs them.
const texts = { at: [], reading: null, done: false };
const readTexts = () => {
  texts.reading ??= (async () => {
    const found = texts.at;
    for (let n = 0; n <= Math.max(-1, ...store.index.chunk); n++) {
      const chunk = await readChunk(n);
      for (const [id, rows, facts] of chunk.cards) {
        const contexts = rows.map(([, , , , , words, strengths]) => {
          // Bytes of a character are left out: its last token has it.
          const tokens = words.map((w) => chunk.words[w].replace(/<0x[0-9A-F]{2}>/g, ""));
          const ends = [];
          for (const token of tokens) ends.push((ends.at(-1) ?? 0) + token.length);
          return { text: tokens.join("").toLowerCase(), fires: strengths.map(([n, s]) => [ends[n] - tokens[n].length, ends[n], s]) };
        });
        found[store.index.place(id)] = { contexts, words: [...facts.up, ...facts.down].map(([word]) => word).join("\n").toLowerCase() };
      }
      await new Promise((rested) => setTimeout(rested, 0));
    }
    if (found === texts.at) texts.done = true;
  })();
  return texts.reading;
};

// How much a latent fires on a text: the mean over its contexts of the strongest activation on it, as a share of its highest; a
// little where it only promotes it or stands next to it; -1 where it has nothing of it.
const firingOn = (known, text) => {
  if (!known) return -1;
  let sum = 0, met = known.words.includes(text);
  for (const { text: context, fires } of known.contexts) {
    let strongest = 0;
    for (let at = context.indexOf(text); at >= 0; at = context.indexOf(text, at + 1)) {
      met = true;
      for (const [begin, end, strength] of fires) if (begin < at + text.length && end > at) strongest = Math.max(strongest, strength);
    }
    sum += strongest;
  }
  return met ? sum / Math.max(1, known.contexts.length) : -1;
};

const DENSITIES = { dead: [-1, 0], rare: [0, 0.001], some: [0.001, 0.01], often: [0.01, 0.1], dense: [0.1, 2] };
const ORDERS = {
  peak: (index, n) => -(index.peak[n] ?? -1),
  density: (index, n) => -(index.density?.[n] ?? 0),
  rare: (index, n) => index.density?.[n] || 2,
  group: (index, n) => index.group[n] || 1e9,
};
// The index's places that pass every filter, in order.
const select = (index, { text, prefix, density, group, order }) => {
  const digits = /^\d+$/.test(text);
  const band = DENSITIES[density];
  const found = [];
  const firing = new Map();
  for (let n = 0; n < index.ids.length; n++) {
    const id = index.ids[n];
    if (prefix !== "" && index.prefix(id) !== Number(prefix)) continue;
    if (band && !(index.density && index.density[n] > band[0] && index.density[n] <= band[1])) continue;
    if (group === "any" ? !index.group[n] : group !== "" && index.group[n] !== Number(group)) continue;
    if (text) firing.set(n, firingOn(texts.at[n], text));
    if (text && !(digits && String(id).startsWith(text)) && firing.get(n) < 0) continue;
    found.push(n);
  }
  if (ORDERS[order]) {
    const keys = new Map(found.map((n) => [n, ORDERS[order](index, n)]));
    found.sort((x, y) => keys.get(x) - keys.get(y) || x - y);
  }
  else if (text) found.sort((x, y) => firing.get(y) - firing.get(x) || x - y);
  if (digits) found.sort((x, y) => (String(index.ids[y]) === text) - (String(index.ids[x]) === text));
  return found;
};

let chosen = -1;
let openLatent = () => {};
const latents = (box) => {
  const [search, prefix, density, group, order] = ["search", "prefix", "density", "group", "order"].map((name) => box.querySelector(`#latent-${name}`));
  const [count, list, spacer, card] = [".count", ".list", ".spacer", ".card"].map((name) => box.querySelector(name));
  let index = null;
  let found = [];
  let asked = 0;

  const row = (at) => {
    const n = found[at], id = index.ids[n];
    const word = index.word[n] < 0 ? make("span", "peak none") : make("span", "peak", ...shown(index.words[index.word[n]]));
    const node = make("div", "row", make("b", "", String(id)), word,
      make("span", "num", index.density ? percent(index.density[n]) : ""), make("span", "num", number(index.peak[n])));
    if (index.density?.[n] === 0) node.append(make("span", "pill", "dead"));
    if (index.group[n]) node.append(make("span", "pill warn", `group ${index.group[n]}`));
    node.style.transform = `translateY(${at * ROW}px)`;
    node.addEventListener("click", () => choose(id));
    return set(node, { role: "option", id: `row-${id}`, "aria-selected": String(id === chosen), "aria-setsize": found.length, "aria-posinset": at + 1 });
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
  const filter = async () => {
    if (!index) return;
    const mine = ++asked;
    const text = search.value.trim().toLowerCase();
    const pass = () => {
      found = select(index, { text, prefix: prefix.value, density: density.value, group: group.value, order: order.value });
      const total = number(index.ids.length);
      count.textContent = found.length === index.ids.length ? `${total} latents` : `${number(found.length)} of ${total} latents`;
      list.scrollTop = 0;
      paint();
    };
    pass();
    if (text && !texts.done) {
      count.textContent += ", reading contexts …";
      await readTexts();
      if (mine === asked) pass();
    }
  };
  const show = (id) => {
    chosen = id;
    const top = found.indexOf(index.place(id)) * ROW;
    if (top >= 0) list.scrollTop = Math.min(top, Math.max(list.scrollTop, top + ROW - list.clientHeight));
    paint();
    const text = search.value.trim().toLowerCase();
    fillCard(card, id, "full", /^\d+$/.test(text) ? "" : text);
  };
  const choose = (id) => {
    show(id);
    try { history.replaceState(null, "", `#latent-${id}`); } catch { /* not everywhere from disk */ }
  };

  list.addEventListener("scroll", () => requestAnimationFrame(paint), { passive: true });
  new ResizeObserver(paint).observe(list);
  let waiting = 0;
  search.addEventListener("input", () => { clearTimeout(waiting); waiting = setTimeout(filter, 90); });
  for (const control of [prefix, density, group, order]) control.addEventListener("change", filter);
  list.addEventListener("keydown", (e) => {
    const at = index ? found.indexOf(index.place(chosen)) : -1;
    const page = Math.max(1, Math.floor(list.clientHeight / ROW) - 1);
    const next = { ArrowDown: at + 1, ArrowUp: at - 1, PageDown: at + page, PageUp: at - page, Home: 0, End: found.length - 1 }[e.key];
    if (next === undefined || !found.length) return;
    e.preventDefault();
    choose(index.ids[found[Math.max(0, Math.min(found.length - 1, next))]]);
  });

  let wanted = null;
  openLatent = (id) => {
    if (!index) { wanted = id; return; }
    if (index.place(id) >= 0 && !found.includes(index.place(id))) {
      for (const control of [search, prefix, density, group]) control.value = "";
      filter();
    }
    choose(id);
    (box.getBoundingClientRect().width < 800 ? card : box).scrollIntoView({ block: "start" });
    card.focus({ preventScroll: true });
  };
  const load = async () => {
    // Of a live page that has new latents: what was unpacked is of the former ones.
    store.chunks.clear();
    Object.assign(texts, { at: [], reading: null, done: false });
    index = store.index = await openIndex([...prefix.options].slice(1).map((option) => option.text));
    await filter();
    wanted ??= linked();
    store.opened();
    // Of a live page: the latent that was open may have no contexts any more.
    if (chosen >= 0 && index.chunk[index.place(chosen)] >= 0) show(chosen);
    else if (wanted !== null) openLatent(wanted);
    else if (found.length) {
      show(index.interesting[0] ?? index.ids[found.find((n) => index.chunk[n] >= 0) ?? found[0]]);
    }
    (window.requestIdleCallback ?? setTimeout)(readTexts);
  };
  load().catch((error) => card.replaceChildren(make("p", "warn", `The latents cannot be unpacked by this browser: ${error.message}`)));
};

// A chip, a link that was pasted into the page's own address, the browser's way back.
const linked = (hash = location.hash) => {
  const found = /^#latent-(\d+)$/.exec(hash);
  return found ? Number(found[1]) : null;
};
addEventListener("hashchange", () => { if (linked() !== null) openLatent(linked()); });
document.addEventListener("click", (e) => {
  const link = e.target.closest("a.chip");
  if (!link) return;
  e.preventDefault();
  openLatent(linked(link.hash));
});
