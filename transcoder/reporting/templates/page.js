
"use strict";
(() => {
  const $ = (id) => document.getElementById(id);
  const data = JSON.parse($("data").textContent);
  const SVG = document.createElementNS.bind(document, "http://www.w3.org/2000/svg");

  // Text from data reaches the page through textContent only: it is shown, never parsed.
  const make = (tag, className, ...children) => {
    const node = document.createElement(tag);
    if (className) node.className = className;
    node.append(...children);
    return node;
  };
  const shape = (tag, attributes) => {
    const node = SVG(tag);
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    return node;
  };
  const short = (value) => (value === null ? "–" : Math.abs(value) >= 100 ? value.toFixed(0) : value.toPrecision(3));

  /* ---- values under the pointer ---- */
  const tip = $("tip");
  const showTip = (x, y, ...lines) => {
    tip.replaceChildren(...lines);
    tip.hidden = false;
    const box = tip.getBoundingClientRect();
    tip.style.left = `${Math.max(4, Math.min(x + 14, innerWidth - box.width - 6))}px`;
    tip.style.top = `${Math.max(4, y - box.height - 12)}px`;
  };
  for (const bar of document.querySelectorAll("[data-tip]")) {
    bar.addEventListener("pointermove", (e) => showTip(e.clientX, e.clientY, bar.dataset.tip));
    bar.addEventListener("pointerleave", () => { tip.hidden = true; });
  }
  for (const svg of document.querySelectorAll("[data-chart]")) {
    let chart = null;
    let layer = null;
    let index = null;
    const load = () => {
      if (chart) return;
      chart = JSON.parse(svg.dataset.chart);
      layer = shape("g", {});
      svg.append(layer);
    };
    const nearest = (xs, at) => {
      let best = 0;
      for (let n = 1; n < xs.length; n++) if (Math.abs(xs[n] - at) < Math.abs(xs[best] - at)) best = n;
      return best;
    };
    const show = (at) => {
      const [, , , height] = svg.getAttribute("viewBox").split(" ").map(Number);
      const marks = [];
      const lines = [];
      let head = null;
      let top = height;
      let x = at;
      // The series with most points sets the step; the others answer with their own nearest one.
      const longest = chart.series.reduce((a, b) => (b.px.length > a.px.length ? b : a));
      index = nearest(longest.px, at);
      x = longest.px[index];
      for (const series of chart.series) {
        const n = nearest(series.px, x);
        if (Math.abs(series.px[n] - x) > 40 || series.py[n] === null) continue;
        head = head ?? `${chart.x} ${longest.xt[index]}`;
        marks.push(shape("circle", { class: `spot ${series.color}`, cx: series.px[n], cy: series.py[n], r: 3.4 }));
        lines.push(make("div", "", make("span", "", series.label), make("b", "", series.yt[n])));
        top = Math.min(top, series.py[n]);
      }
      layer.replaceChildren(shape("line", { class: "cross", x1: x, x2: x, y1: 24, y2: height - 36 }), ...marks);
      const box = svg.getBoundingClientRect();
      const scale = box.width / svg.viewBox.baseVal.width;
      showTip(box.left + x * scale, box.top + top * scale, make("div", "", head ?? ""), ...lines);
    };
    const hide = () => { tip.hidden = true; if (layer) layer.replaceChildren(); };
    svg.addEventListener("pointermove", (e) => {
      load();
      const box = svg.getBoundingClientRect();
      show(((e.clientX - box.left) / box.width) * svg.viewBox.baseVal.width);
    });
    svg.addEventListener("pointerleave", hide);
    svg.addEventListener("blur", hide);
    svg.addEventListener("keydown", (e) => {
      const move = { ArrowLeft: -1, ArrowRight: 1 }[e.key];
      if (!move) return;
      e.preventDefault();
      load();
      const longest = chart.series.reduce((a, b) => (b.px.length > a.px.length ? b : a));
      const next = index === null ? longest.px.length - 1 : Math.max(0, Math.min(longest.px.length - 1, index + move));
      show(longest.px[next]);
    });
  }

  /* ---- latents ---- */
  const latents = data.latents.map((entry, shown) => ({ ...entry, shown }));
  const byId = new Map(latents.map((latent) => [latent.id, latent]));
  const rangeOf = (latent) => {
    if (data.widths.length < 2) return "";
    const low = latent.prefix ? data.widths[latent.prefix - 1] : 0;
    return `prefix ${low.toLocaleString("en")} to ${(data.widths[latent.prefix] - 1).toLocaleString("en")}`;
  };

  // Line ends and tabs get a sign; the rest of a token is left as it is.
  const visible = (text) => {
    const parts = [];
    for (const piece of text.split(/(\r\n|\n|\r|\t)/)) {
      if (/^[\r\n\t]/.test(piece)) parts.push(make("span", "ws", piece === "\t" ? "⇥" : "↵"));
      else if (piece) parts.push(piece.replace(/[\u0000-\u001f\u007f]/g, (c) => String.fromCharCode(0x2400 + Math.min(c.charCodeAt(0), 0x21))));
    }
    return parts.length ? parts : ["∅"];
  };
  const contextRow = (row) => {
    const [, activation, position, sequence, column, tokens, shades] = row;
    const strength = new Map(shades);
    const before = [];
    const after = [];
    let here = null;
    tokens.forEach((number, n) => {
      const mark = make(strength.has(n) ? "mark" : "span", "", ...visible(data.strings[number]));
      if (strength.has(n)) mark.style.setProperty("--s", (0.12 + 0.6 * strength.get(n)).toFixed(2));
      if (n < column) before.push(mark);
      else if (n > column) after.push(mark);
      else here = mark;
    });
    here.classList.add("here");
    const text = make("div", "text", make("span", "before", make("span", "", ...before)), make("span", "", here, ...after));
    const line = make("div", "ctx", make("span", "a", short(activation)), text);
    line.title = `activation ${short(activation)}, position ${position}` + (sequence >= 0 ? `, sequence ${sequence}` : "");
    return line;
  };
  const histogram = (latent) => {
    const values = latent.rows.map((row) => row[1]).filter((v) => v !== null);
    const counts = new Array(14).fill(0);
    for (const v of values) counts[Math.min(13, Math.floor((14 * v) / (latent.max || 1)))]++;
    const most = Math.max(1, ...counts);
    const svg = shape("svg", { class: "spark", viewBox: "0 0 112 28", width: 112, height: 28, role: "img" });
    const title = shape("title", {});
    title.textContent = `Activations of the ${values.length} samples shown, from 0 to ${short(latent.max)}`;
    svg.append(title, shape("line", { x1: 0, x2: 112, y1: 27.5, y2: 27.5 }));
    counts.forEach((count, n) => {
      const tall = (25 * count) / most;
      if (count) svg.append(shape("rect", { x: 8 * n + 0.5, y: 27 - tall, width: 7, height: tall, rx: 1 }));
    });
    return svg;
  };
  const chip = (id) => {
    const link = make("a", "chip", String(id));
    link.href = `#latent-${id}`;
    link.dataset.latent = id;
    return link;
  };
  const card = (latent, full) => {
    const meta = make("span", "meta", make("span", "", `strongest ${short(latent.max)}`), make("span", "", `${latent.samples} samples`));
    if (rangeOf(latent)) meta.append(make("span", "", rangeOf(latent)));
    if (latent.pairs.length) meta.append(make("span", "", "in a pair with "), ...latent.pairs.map(chip));
    const title = make("h4", "", `Latent ${latent.id}`);
    const box = make("article", "card", make("header", "", title, meta, histogram(latent)));
    for (const [kind, label] of [[1, "Strongest"], [0, "Across positions"]]) {
      const rows = latent.rows.filter((row) => row[0] === kind);
      if (!rows.length) continue;
      box.append(make("h5", "", label));
      const shown = rows.slice(0, full ? 6 : 5).map(contextRow);
      box.append(...shown);
      const rest = rows.slice(shown.length);
      if (rest.length) {
        const more = make("button", "open", `${rest.length} more`);
        more.type = "button";
        more.addEventListener("click", () => more.replaceWith(...rest.map(contextRow)));
        box.append(more);
      }
    }
    return box;
  };

  const cards = $("cards");
  let goTo = () => {};
  if (cards && latents.length) {
    document.querySelector('[data-for="latents"]').hidden = false;
    const PAGE = 12;
    const search = $("latent-search");
    const prefix = $("latent-prefix");
    const order = $("latent-order");
    const paired = $("latent-paired");
    const more = $("latent-more");
    const haystacks = new Map();
    const haystack = (latent) => {
      if (!haystacks.has(latent.id)) {
        const texts = latent.rows.map((row) => row[5].map((n) => data.strings[n]).join(""));
        haystacks.set(latent.id, texts.join("\n").toLowerCase());
      }
      return haystacks.get(latent.id);
    };
    let found = [];
    let drawn = 0;
    const draw = (count) => {
      const upTo = Math.min(found.length, drawn + count);
      const fresh = found.slice(drawn, upTo).map((latent) => {
        const box = card(latent, true);
        box.id = `latent-${latent.id}`;
        return box;
      });
      cards.append(...fresh);
      drawn = upTo;
      more.hidden = drawn >= found.length;
      const all = found.length === latents.length ? "" : ` of ${latents.length}`;
      $("latent-count").textContent = `${found.length}${all} latents`;
    };
    const sorts = { shown: (a, b) => a.shown - b.shown, max: (a, b) => (b.max ?? 0) - (a.max ?? 0), id: (a, b) => a.id - b.id };
    const filter = () => {
      const text = search.value.trim().toLowerCase();
      const wanted = prefix ? prefix.value : "";
      found = latents.filter((latent) =>
        (!paired.checked || latent.pairs.length) &&
        (wanted === "" || latent.prefix === Number(wanted)) &&
        (text === "" || (/^\d+$/.test(text) && String(latent.id).startsWith(text)) || haystack(latent).includes(text)));
      found.sort(sorts[order.value]);
      cards.replaceChildren();
      drawn = 0;
      draw(PAGE);
      if (!found.length) cards.append(make("p", "empty", "No latent in this page matches."));
    };
    let waiting = 0;
    search.addEventListener("input", () => { clearTimeout(waiting); waiting = setTimeout(filter, 120); });
    for (const control of [prefix, order, paired]) if (control) control.addEventListener("change", filter);
    $("latent-wrap").addEventListener("change", (e) => cards.classList.toggle("wrap", e.target.checked));
    more.addEventListener("click", () => draw(PAGE));
    goTo = (id) => {
      const latent = byId.get(id);
      if (!latent) {
        search.value = String(id);
        filter();
        $("latents").scrollIntoView();
        return;
      }
      if (!found.includes(latent)) {
        search.value = "";
        paired.checked = false;
        if (prefix) prefix.value = "";
        filter();
      }
      const place = found.indexOf(latent);
      if (place >= drawn) draw(place - drawn + 1);
      for (const old of cards.querySelectorAll(".found")) old.classList.remove("found");
      const box = $(`latent-${id}`);
      box.classList.add("found");
      box.scrollIntoView({ block: "center" });
    };
    filter();
  }
  document.addEventListener("click", (e) => {
    const link = e.target.closest("a[data-latent]");
    if (!link || !latents.length) return;
    e.preventDefault();
    goTo(Number(link.dataset.latent));
  });
  const linked = /^#latent-(\d+)$/.exec(location.hash);
  if (linked) goTo(Number(linked[1]));

  /* ---- pairs ---- */
  const pairs = $("pairs");
  if (pairs) {
    document.querySelector('[data-for="pairs"]').hidden = false;
    const PAGE = 15;
    const rows = [...pairs.tBodies[0].rows];
    const search = $("pair-search");
    const flagged = $("pair-flagged");
    const more = $("pair-more");
    const count = $("pair-count");
    const whole = count.textContent;
    let limit = PAGE;
    const side = (id) => {
      const latent = byId.get(id);
      if (latent) return card(latent, false);
      return make("p", "empty", `No contexts of latent ${id} are in this page (none were kept, or logging.report_latents is too small).`);
    };
    const close = (row) => {
      const button = row.querySelector("button.open");
      if (row.nextElementSibling?.classList.contains("detail")) row.nextElementSibling.remove();
      button.setAttribute("aria-expanded", "false");
    };
    const filter = () => {
      const id = search.value.trim();
      let matching = 0;
      for (const row of rows) {
        const match = (id === "" || row.dataset.i === id || row.dataset.j === id) && (!flagged.checked || row.dataset.flagged === "1");
        if (match) matching++;
        row.hidden = !match || matching > limit;
        if (row.hidden) close(row);
      }
      more.hidden = matching <= limit;
      count.textContent = id === "" && !flagged.checked ? whole : `${matching} of ${rows.length} pairs`;
    };
    for (const row of rows) {
      const button = row.querySelector("button.open");
      button.hidden = false;
      button.addEventListener("click", () => {
        if (button.getAttribute("aria-expanded") === "true") { close(row); return; }
        button.setAttribute("aria-expanded", "true");
        const cell = make("td", "", make("div", "sides", side(Number(row.dataset.i)), side(Number(row.dataset.j))));
        cell.colSpan = row.cells.length;
        row.after(make("tr", "detail", cell));
      });
    }
    search.addEventListener("input", filter);
    flagged.addEventListener("change", filter);
    more.addEventListener("click", () => { limit += PAGE * 4; filter(); });
    filter();
  }

  /* ---- which section is being read ---- */
  const links = new Map([...document.querySelectorAll("nav a")].map((a) => [a.getAttribute("href").slice(1), a]));
  if ("IntersectionObserver" in window) {
    const seen = new Map();
    const observer = new IntersectionObserver((entries) => {
      for (const entry of entries) seen.set(entry.target.id, entry.isIntersecting);
      const current = [...links.keys()].find((id) => seen.get(id));
      for (const [id, link] of links) {
        if (id === current) link.setAttribute("aria-current", "true");
        else link.removeAttribute("aria-current");
      }
    }, { rootMargin: "-20% 0px -70% 0px" });
    for (const section of document.querySelectorAll("main > section")) observer.observe(section);
  }
})();
