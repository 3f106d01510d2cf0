// A latent's card, and the packed chunks that cards come from.
const KEPT_CHUNKS = 8;
const store = { chunks: new Map(), index: null, version: data.version };
store.ready = new Promise((done) => { store.opened = done; });

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
const readChunk = async (n) => {
  const text = await packedText(`chunk-${n}`);
  return text === null ? { words: [], cards: [] } : JSON.parse(await unpack(text));
};
// Only the chunks opened last stay unpacked.
const loadChunk = (n) => {
  const held = store.chunks.get(n) ?? readChunk(n);
  store.chunks.delete(n);
  store.chunks.set(n, held);
  if (store.chunks.size > KEPT_CHUNKS) store.chunks.delete(store.chunks.keys().next().value);
  return held;
};
const loadCard = async (id) => {
  const n = store.index?.chunk[store.index.place(id)] ?? -1;
  if (n < 0) return null;
  const chunk = await loadChunk(n);
  const found = chunk.cards.find((card) => card[0] === id);
  if (!found) {
    store.chunks.delete(n);
    return null;
  }
  const [, rows, facts] = found;
  return { facts, rows: rows.map(([top, activation, position, sequence, column, words, strengths]) => ({
    top: top === 1, activation, position, sequence, column, tokens: words.map((w) => chunk.words[w]), strength: new Map(strengths),
  })) };
};

// Spaces, line ends, tabs and single bytes get a sign; the rest of a token is left as it is.
const SIGNS = { "\t": "⇥", " ": "·" };
const shown = (text) => {
  const parts = [];
  for (const piece of text.split(/(\r\n|\n|\r|\t| {2,}|^ | $|(?:<0x[0-9A-Fa-f]{2}>)+)/)) {
    if (/^<0x/.test(piece)) parts.push(make("span", "ws byte", piece.replace(/<0x(..)>/g, "$1 ").trim()));
    else if (/^ +$/.test(piece)) parts.push(make("span", "ws", piece.length > 4 ? `·×${piece.length}` : "·".repeat(piece.length)));
    else if (/^[\r\n\t]/.test(piece)) parts.push(make("span", "ws", SIGNS[piece] ?? "↵"));
    else if (piece) parts.push(piece.replace(/[\u0000-\u001f\u007f]/g, (c) => String.fromCharCode(0x2400 + Math.min(c.charCodeAt(0), 0x21))));
  }
  return parts.length ? parts : ["∅"];
};
const contextRow = (row) => {
  const inside = make("span", "");
  const after = make("span", "after");
  row.tokens.forEach((token, n) => {
    const strength = row.strength.get(n);
    const mark = make(strength === undefined ? "span" : "mark", n === row.column ? "here" : "", ...shown(token));
    if (strength !== undefined) {
      mark.style.setProperty("--s", (0.1 + 0.62 * strength).toFixed(2));
      mark.title = `${Math.round(100 * strength)} % of the latent's strongest`;
    }
    (n <= row.column ? inside : after).append(mark);
  });
  const line = make("div", "ctx", make("span", "a", number(row.activation)), make("div", "text", make("span", "before", inside), after));
  line.title = `activation ${number(row.activation)}, position ${row.position}${row.sequence >= 0 ? `, sequence ${row.sequence}` : ""}`;
  return line;
};

// Activations of the tokens that the latent fires on, from 0 to its highest; lines stand at the quartiles.
const histogram = ({ histogram: bins, quantiles }, peak) => {
  const most = Math.max(...bins);
  const label = `How strongly it fires, over ${number(store.index.tokens)} tokens`;
  const title = shape("title", {});
  title.textContent = label;
  const svg = shape("svg", { class: "spark", viewBox: `0 0 ${bins.length * 7} 34`, role: "img", "aria-label": `${label}: ${bins.join(", ")}` });
  svg.append(title, ...bins.map((n, at) => {
    // Square root: a latent fires weakly far more often than strongly, and the strong ones are what is asked for.
    const height = n ? Math.max(1.5, 30 * Math.sqrt(n / most)) : 0;
    return shape("rect", { x: at * 7, y: 32 - height, width: 5.6, height, rx: 1 });
  }), shape("line", { x1: 0, x2: bins.length * 7, y1: 32.5, y2: 32.5 }), ...quantiles.slice(0, 3).map((value) => {
    const x = (bins.length * 7 * value) / peak;
    return shape("line", { class: "quantile", x1: x, x2: x, y1: 2, y2: 32 });
  }));
  return make("figure", "histogram", svg, make("figcaption", "", ...["0", "activation", number(peak)].map((words) => make("span", "", words))));
};

const tokenList = (title, tokens) => make("div", "logits", make("h5", "", title), make("p", "",
  ...tokens.map(([word, logit]) => make("span", "token", ...shown(word), make("small", "", `${logit > 0 ? "+" : ""}${number(logit)}`)))));

// Contexts that were drawn whatever their strength, by the quarter of the latent's activations that they are in.
const QUARTERS = ["The strongest quarter of its firings", "The next quarter", "The quarter below", "The weakest quarter"];
const groupsOf = (card) => {
  const groups = [["Strongest", card.rows.filter((row) => row.top)]];
  const drawn = card.rows.filter((row) => !row.top);
  const quartiles = card.facts.quantiles.slice(0, 3);
  if (quartiles.length < 3) return [...groups, ["Across positions", drawn]];
  const quarter = (row) => 3 - quartiles.filter((value) => row.activation >= value).length;
  return [...groups, ...QUARTERS.map((label, n) => [label, drawn.filter((row) => quarter(row) === n)])];
};
// The contexts with what was searched for (`find`) come first, under their own heading.
const contextsOf = (card, count, find) => {
  const hits = find ? card.rows.filter((row) => row.tokens.join("").toLowerCase().includes(find)) : [];
  const parts = hits.length ? [make("h5", "", `With “${find}”`), ...hits.slice(0, 5).map(contextRow)] : [];
  for (const [n, [label, rows]] of groupsOf(card).entries()) {
    const most = n ? Math.ceil(count / 3) : count;
    if (!rows.length) continue;
    parts.push(make("h5", "", label), ...rows.slice(0, most).map(contextRow));
    if (rows.length > most) {
      const more = set(make("button", "open", `${rows.length - most} more`), { type: "button" });
      more.addEventListener("click", () => more.replaceWith(...rows.slice(most).map(contextRow)));
      parts.push(more);
    }
  }
  return parts.length ? parts : [make("p", "empty", "No context of it was kept.")];
};
const whyNone = (index, id) => {
  const place = index?.place(id) ?? -1;
  if (place < 0) return "This run has no latent of that id.";
  if (index.density?.[place] === 0) return `Dead: it did not fire on ${number(index.tokens)} tokens.`;
  if (!index.samples[place]) return "No context of this latent was kept.";
  return "Its contexts are not in this page: logging.report_latents, or the page's size, is too small for all.";
};

// `look`: "full"; "side", in the side-by-side view of a pair; "brief", a few rows and what the latent promotes.
const fillCard = async (box, id, look, find = "") => {
  box.dataset.wanted = String(id);
  box.replaceChildren(make("p", "note", "…"));
  const card = await loadCard(id);
  // Another latent was chosen while this one was unpacked.
  if (box.dataset.wanted !== String(id)) return;
  const index = store.index;
  const place = index?.place(id) ?? -1;
  const facts = [];
  if (place >= 0) {
    const density = index.density?.[place];
    if (index.density) facts.push(density === 0 ? ["dead", ""] : ["fires on", `${percent(density)} of tokens`]);
    if (index.peak[place] && look !== "brief") facts.push(["strongest", number(index.peak[place])]);
    if (index.widths.length > 1 && look !== "brief") facts.push(["prefix", index.prefixName(id)]);
  }
  const meta = make("p", "meta", ...facts.map(([name, value]) => make("span", "", `${name} `, make("b", "", value))));
  const name = look === "full" ? `Latent ${id}` : chip(id);
  const head = make("header", "", make("h4", "", name), meta);
  const parts = [head];
  const near = (words, links) => { if (links.length) parts.push(make("p", "meta near", make("span", "", words), ...links)); };
  if (card && look === "brief") {
    near("promotes", card.facts.up.slice(0, 4).map(([word]) => make("span", "token", ...shown(word))));
    parts.push(...card.rows.filter((row) => row.top).slice(0, Number(box.dataset.rows)).map(contextRow));
  } else if (card) {
    if (card.facts.histogram.some((n) => n)) head.append(histogram(card.facts, index.peak[place]));
    near("in a pair with", (index.partners[id] ?? []).map(([other, said]) => chip(other, make("small", "", ` ${said}`))));
    near("nearest decoder directions", card.facts.near.slice(0, look === "full" ? 8 : 4).map(([other, cosine]) => chip(other, make("small", "", ` ${cosine.toFixed(2)}`))));
    if (look === "full" && card.facts.up.length + card.facts.down.length) {
      parts.push(make("div", "promoted", tokenList("Promotes", card.facts.up), tokenList("Suppresses", card.facts.down)));
    }
    parts.push(...contextsOf(card, look === "full" ? 8 : 4, find));
  } else {
    parts.push(make("p", "empty", whyNone(index, id)));
  }
  box.replaceChildren(...parts);
};
const briefCard = async (box) => {
  await store.ready;
  fillCard(box, Number(box.dataset.latent), "brief");
};
