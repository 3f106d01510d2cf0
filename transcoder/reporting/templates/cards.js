// A latent's card, and the packed chunks that cards come from.
const store = { chunks: new Map(), index: null, version: 0 };

const packedText = async (name) => {
  await parsed;
  const held = $(name);
  if (held) return held.textContent;
  if (!data.live) return null;
  try {
    const answer = await fetch(`packed/${name}?v=${store.version}`);
    return answer.ok ? answer.text() : null;
  } catch {
    return null; // the server was stopped: what is here stays
  }
};
const KEPT = 8;
const readChunk = async (n) => {
  const text = await packedText(`chunk-${n}`);
  return text === null ? { words: [], cards: [] } : JSON.parse(await unpack(text));
};
// Only the chunks opened last stay unpacked.
const loadChunk = (n) => {
  const held = store.chunks.get(n) ?? readChunk(n);
  store.chunks.delete(n);
  store.chunks.set(n, held);
  if (store.chunks.size > KEPT) store.chunks.delete(store.chunks.keys().next().value);
  return held;
};
const loadCard = async (id) => {
  const place = store.index?.place(id) ?? -1;
  const n = place < 0 ? -1 : store.index.chunk[place];
  if (n < 0) return null;
  const chunk = await loadChunk(n);
  const found = chunk.cards.find((card) => card[0] === id);
  if (!found) {
    store.chunks.delete(n);
    return null;
  }
  const [, rows, facts] = found;
  return { id, facts, rows: rows.map((row) => ({
    top: row[0] === 1, activation: row[1], position: row[2], sequence: row[3], column: row[4],
    tokens: row[5].map((w) => chunk.words[w]), strength: new Map(row[6]),
  })) };
};

// Line ends and tabs get a sign; the rest of a token is left as it is.
const shown = (text) => {
  const parts = [];
  for (const piece of text.split(/(\r\n|\n|\r|\t)/)) {
    if (/^[\r\n\t]/.test(piece)) parts.push(make("span", "ws", piece === "\t" ? "⇥" : "↵"));
    else if (piece) parts.push(piece.replace(/[\u0000-\u001f\u007f]/g, (c) => String.fromCharCode(0x2400 + Math.min(c.charCodeAt(0), 0x21))));
  }
  return parts.length ? parts : ["∅"];
};
const contextRow = (row) => {
  const before = make("span", "before");
  const after = make("span", "after");
  const inside = make("span", "");
  before.append(inside);
  row.tokens.forEach((token, n) => {
    const strength = row.strength.get(n);
    const mark = make(strength === undefined ? "span" : "mark", n === row.column ? "here" : "", ...shown(token));
    if (strength !== undefined) {
      mark.style.setProperty("--s", (0.1 + 0.62 * strength).toFixed(2));
      mark.title = `${Math.round(100 * strength)} % of the latent's strongest`;
    }
    (n <= row.column ? inside : after).append(mark);
  });
  const line = make("div", "ctx", make("span", "a", figure(row.activation)), make("div", "text", before, after));
  line.title = `activation ${figure(row.activation)}, position ${row.position}${row.sequence >= 0 ? `, sequence ${row.sequence}` : ""}`;
  return line;
};

const histogram = (card, peak) => {
  let bins = card.facts.histogram;
  let label = "How strongly it fires, over held-out tokens";
  if (!bins.some((n) => n)) {
    bins = new Array(20).fill(0);
    for (const row of card.rows) bins[Math.min(19, Math.floor((20 * row.activation) / Math.max(peak ?? 0, 1e-9)))]++;
    label = "How strongly it fires, over the kept samples";
  }
  const most = Math.max(...bins, 1);
  const svg = shape("svg", { class: "spark", viewBox: `0 0 ${bins.length * 7} 34`, role: "img", "aria-label": `${label}: ${bins.join(", ")}` });
  bins.forEach((n, at) => {
    // Square root: a latent fires weakly far more often than strongly, and the strong ones are what is asked for.
    const high = n ? Math.max(1.5, 30 * Math.sqrt(n / most)) : 0;
    svg.append(shape("rect", { x: at * 7, y: 32 - high, width: 5.6, height: high, rx: 1 }));
  });
  svg.append(shape("line", { x1: 0, x2: bins.length * 7, y1: 32.5, y2: 32.5 }));
  const title = shape("title", {});
  title.textContent = label;
  svg.prepend(title);
  return make("figure", "histogram", svg, make("figcaption", "", make("span", "", "0"), make("span", "", "activation"), make("span", "", figure(peak))));
};

const tokenList = (title, tokens) => make("div", "logits", make("h5", "", title), make("p", "", ...tokens.map(([word, logit]) => {
  const node = make("span", "token", ...shown(word), make("small", "", `${logit > 0 ? "+" : ""}${figure(logit)}`));
  return node;
})));

// `find`: what was searched for; the contexts that have it come first, under its own heading.
const contextsOf = (box, card, count, find) => {
  const before = box.childElementCount;
  const hits = find ? card.rows.filter((row) => row.tokens.join("").toLowerCase().includes(find)) : [];
  if (hits.length) box.append(make("h5", "", `With “${find}”`), ...hits.slice(0, 5).map(contextRow));
  for (const [top, label] of [[true, "Strongest"], [false, "Across positions"]]) {
    const rows = card.rows.filter((row) => row.top === top);
    if (!rows.length) continue;
    box.append(make("h5", "", label), ...rows.slice(0, count).map(contextRow));
    const more = rows.slice(count);
    if (more.length) {
      const open = button(`${more.length} more`, "open", () => open.replaceWith(...more.map(contextRow)));
      box.append(open);
    }
  }
  if (box.childElementCount === before) box.append(make("p", "empty", "No context of it was kept."));
};

// `full` adds what the side-by-side view of a pair has no room for.
const fillCard = async (box, id, full, find = "") => {
  box.replaceChildren(make("p", "note", "…"));
  const index = store.index;
  const place = index ? index.place(id) : -1;
  const card = await loadCard(id);
  if (box.dataset.wanted !== undefined && box.dataset.wanted !== String(id)) return;
  const facts = make("p", "meta");
  const fact = (name, value) => facts.append(make("span", "", `${name} `, make("b", "", value)));
  if (place >= 0) {
    if (index.density) fact("fires on", index.density[place] === null ? "–" : index.density[place] === 0 ? "none of the tokens counted" : `${share(index.density[place])} of tokens`);
    if (index.peak[place] !== null) fact("strongest", figure(index.peak[place]));
    if (index.widths.length > 1) fact("prefix", index.prefixes[index.prefix(id)] ?? "–");
    if (index.group[place]) fact("duplicate group", String(index.group[place]));
  }
  const head = make("header", "", make("h4", "", `Latent ${id}`), facts);
  if (card) head.append(histogram(card, index.peak[place]));
  const parts = [head];
  const partners = index?.partners[id] ?? [];
  if (partners.length) parts.push(make("p", "meta near", make("span", "", "correlates with"), ...partners.map(latentLink)));
  if (card?.facts.near.length) {
    parts.push(make("p", "meta near", make("span", "", "nearest decoder directions"), ...card.facts.near.slice(0, full ? 8 : 4).map(([other, cosine]) => {
      const link = latentLink(other);
      link.append(make("small", "", ` ${cosine.toFixed(2)}`));
      return link;
    })));
  }
  if (full && card && (card.facts.up.length || card.facts.down.length)) {
    parts.push(make("div", "promoted", tokenList("Promotes", card.facts.up), tokenList("Suppresses", card.facts.down)));
  }
  box.replaceChildren(...parts);
  if (card) contextsOf(box, card, full ? 8 : 5, find);
  else box.append(make("p", "empty", index && place < 0 ? "This run has no latent of that id." : !index?.samples[place] ? "No context of this latent was kept." : "Its contexts are not in this page: logging.report_latents, or the page's size, is too small for all."));
  if (full && index) {
    const why = Object.entries(index.lacking).map(([what, reason]) => `${what}: ${reason}`);
    if (why.length) box.append(make("p", "note", `Not shown: ${why.join("; ")}.`));
  }
};
