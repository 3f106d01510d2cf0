// Charts by plotly.js, drawn when they come into view; each has its values as a table for those who cannot see it.
let library = null;
const plotly = () => {
  library ??= (async () => {
    await parsed;
    const packed = $("plotly");
    if (!packed) return null;
    let text = "";
    try {
      text = await unpack(packed.textContent);
    } catch {
      return null; // a browser from before 2023
    }
    packed.remove();
    // The page's policy knows the hash of exactly this text.
    document.head.append(make("script", "", text));
    // It calls home only when asked to; it never is.
    return window.Plotly ?? null;
  })();
  return library;
};

const SANS = 'system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif';
// A long title of an axis breaks where a narrow chart, or a phone, would cut it.
const broken = (text) => {
  const most = innerWidth > 560 ? 50 : 36;
  const lines = [""];
  for (const word of text.split(" ")) {
    if (lines[lines.length - 1].length + word.length > most) lines.push("");
    lines[lines.length - 1] += `${lines[lines.length - 1] ? " " : ""}${word}`;
  }
  return lines.map(plain).join("<br>");
};
const axis = (title, more) => ({
  title: { text: broken(title), standoff: 8, font: { size: 12, color: colour("muted") } },
  gridcolor: colour("grid"), linecolor: colour("line"), zerolinecolor: colour("line"), tickcolor: colour("line"),
  tickfont: { size: 11, color: colour("muted") }, automargin: true, fixedrange: true, ...more,
});
const layout = (chart, more) => ({
  height: 250, margin: { l: 50, r: 14, t: 8, b: 42 }, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
  font: { family: SANS, size: 12, color: colour("fg") }, hovermode: "x unified",
  hoverlabel: { bgcolor: colour("panel"), bordercolor: colour("line"), font: { family: SANS, size: 12, color: colour("fg") } },
  showlegend: false, ...more,
});

const drawings = {
  lines(chart) {
    const traces = [];
    for (const s of chart.series) {
      const name = s.label;
      if (s.low) {
        const band = { x: s.x, mode: "lines", line: { width: 0 }, hoverinfo: "skip", type: "scatter" };
        traces.push({ ...band, y: s.low }, { ...band, y: s.high, fill: "tonexty", fillcolor: faint(s.color, 0.16) });
      }
      traces.push({
        x: s.x, y: s.y, name, type: "scatter", mode: s.dots || s.x.length === 1 ? "lines+markers" : "lines",
        line: { color: colour(s.color), width: 1.8 }, marker: { size: 6, color: colour(s.color) },
        hovertemplate: "%{y:.4~g}<extra>" + (chart.series.length > 1 ? "%{fullData.name}" : "") + "</extra>",
      });
    }
    const steps = chart.series.flatMap((s) => [s.x[0], s.x[s.x.length - 1]]);
    const values = chart.series.flatMap((s) => [...(s.low ?? s.y), ...(s.high ?? s.y)]).filter((v) => v !== null);
    const all = [...values, ...chart.references.map((r) => r[0])];
    const least = Math.min(...all), most = Math.max(...all);
    // Noise on a constant should look like it.
    const room = Math.max(0.06 * (most - least), 0.05 * Math.max(Math.abs(most), 1e-9) - (most - least) / 2);
    // Nothing but zeros: a scale of billionths would say nothing.
    const flat = least === 0 && most === 0;
    const y = flat ? { range: [0, 1] } : chart.log ? { type: "log", dtick: most / least < 30 ? "D2" : 1 }
      : { range: [chart.zero ? Math.min(0, least) : least - room, most + room] };
    return [traces, layout(chart, {
      xaxis: axis(chart.x, { range: steps.length && Math.min(...steps) < Math.max(...steps) ? [Math.min(...steps), Math.max(...steps)] : undefined, separatethousands: true }),
      yaxis: axis(chart.y + (chart.log ? " (log)" : ""), y),
      shapes: chart.references.map(([at]) => ({
        type: "line", xref: "paper", x0: 0, x1: 1, y0: at, y1: at, line: { color: colour("muted"), width: 1, dash: "dash" },
      })),
      annotations: chart.references.map(([at, label]) => ({
        xref: "paper", x: 1, xanchor: "right", y: chart.log ? Math.log10(at) : at, yanchor: "bottom", showarrow: false,
        text: plain(label), font: { size: 11, color: colour("muted") },
      })),
    })];
  },
  bars(chart) {
    const middles = chart.edges.slice(1).map((e, n) => (e + chart.edges[n]) / 2);
    const ranges = middles.map((_, n) => `${figure(chart.edges[n])} to ${figure(chart.edges[n + 1])}`);
    const traces = chart.groups.map((g) => ({
      type: "bar", name: g.label, x: middles, y: g.heights.map((h) => (h > 0 ? h : null)), customdata: ranges,
      marker: { color: colour(g.color), cornerradius: 2 }, hovertemplate: "%{customdata}: %{y:.4~g}<extra>" + (chart.groups.length > 1 ? "%{fullData.name}" : "") + "</extra>",
    }));
    return [traces, layout(chart, {
      hovermode: "closest", bargap: 0.12, bargroupgap: 0.05,
      xaxis: axis(chart.x, { range: [chart.edges[0], chart.edges[chart.edges.length - 1]] }),
      yaxis: axis(chart.y + (chart.log ? " (log)" : ""), { type: chart.log ? "log" : "linear", dtick: chart.log ? 1 : undefined }),
      shapes: chart.marks.map(([at]) => ({
        type: "line", yref: "paper", y0: 0, y1: 1, x0: at, x1: at, line: { color: colour("muted"), width: 1, dash: "dash" },
      })),
      annotations: chart.marks.map(([at, label]) => ({
        yref: "paper", y: 1, yanchor: "top", x: at, xanchor: at > (chart.edges[0] + chart.edges[chart.edges.length - 1]) / 2 ? "right" : "left",
        showarrow: false, text: plain(label), font: { size: 11, color: colour("muted") },
      })),
    })];
  },
  intervals(chart) {
    const names = { better: "c2", worse: "c1" };
    const traces = chart.rows.map((r) => ({
      type: "scatter", mode: "markers", x: [r.mean], y: [plain(r.label)], marker: { size: 9, color: colour(names[r.verdict] ?? "c0") },
      error_x: r.low === null ? undefined : { type: "data", symmetric: false, array: [r.high - r.mean], arrayminus: [r.mean - r.low], color: colour(names[r.verdict] ?? "c0"), thickness: 2, width: 5 },
      hovertemplate: r.low === null ? "%{x:.4~g}<extra></extra>" : `%{x:.4~g} [${figure(r.low)}, ${figure(r.high)}]<extra></extra>`,
    }));
    return [traces, layout(chart, {
      height: 90 + 30 * chart.rows.length, hovermode: "closest",
      xaxis: axis(chart.x, { zeroline: true, zerolinewidth: 2, zerolinecolor: colour("muted") }),
      yaxis: axis("", { autorange: "reversed", type: "category" }),
    })];
  },
  graph(chart) {
    const place = new Map();
    // Each group is a circle of its latents; the circles stand in rows, the largest first.
    let x = 0, y = 0, high = 0;
    const wide = Math.max(8, Math.sqrt(chart.groups.reduce((sum, g) => sum + (2 * circle(g) + 1.6) * (2 * circle(g) + 1.2), 0)) * 1.1);
    for (const group of chart.groups) {
      const radius = circle(group);
      if (x + 2 * radius > wide && x > 0) { x = 0; y -= high + 1.2; high = 0; }
      group.forEach((id, n) => {
        const turn = (2 * Math.PI * n) / group.length + (group.length === 2 ? 0 : Math.PI / 2);
        place.set(id, [x + radius + radius * Math.cos(turn), y - radius - radius * Math.sin(turn)]);
      });
      x += 2 * radius + 1.6;
      high = Math.max(high, 2 * radius);
    }
    const link = (chosen, name, width) => ({
      type: "scatter", mode: "lines", hoverinfo: "skip", line: { color: name === "muted" && width < 3 ? faint(name, 0.45) : colour(name), width },
      x: chosen.flatMap(([i, j]) => [place.get(i)[0], place.get(j)[0], null]), y: chosen.flatMap(([i, j]) => [place.get(i)[1], place.get(j)[1], null]),
    });
    const edges = (flagged, folds) => chart.edges.filter((e) => e[3] === flagged && e[4] === folds);
    const ids = [...place.keys()];
    const dots = {
      type: "scatter", mode: ids.length > 90 ? "markers" : "markers+text", x: ids.map((i) => place.get(i)[0]), y: ids.map((i) => place.get(i)[1]), text: ids.map(String),
      textposition: "top center", textfont: { size: 10, color: colour("muted") }, customdata: ids, cliponaxis: false,
      marker: { size: ids.length > 60 ? 9 : 12, color: colour("c0"), line: { color: colour("panel"), width: 1.5 } }, hovertemplate: "latent %{customdata}<extra></extra>",
    };
    const none = { visible: false, fixedrange: true };
    return [
      [link(edges(0, 0), "muted", 2), link(edges(0, 1), "c1", 2), link(edges(1, 0), "muted", 4.5), link(edges(1, 1), "c1", 4.5), dots],
      layout(chart, { height: 560, hovermode: "closest", margin: { l: 14, r: 14, t: 18, b: 8 }, xaxis: none, yaxis: { ...none, scaleanchor: "x" } }),
    ];
  },
};
const circle = (group) => (group.length === 2 ? 0.7 : Math.max(0.9, (1.15 * group.length) / Math.PI));
// plotly reads a little HTML in its texts; ours are to be shown as they are.
const plain = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");

const valuesOf = (chart) => {
  if (chart.kind === "bars") {
    return [["from", "to", ...chart.groups.map((g) => g.label)], chart.edges.slice(1).map((e, n) => [figure(chart.edges[n]), figure(e), ...chart.groups.map((g) => figure(g.heights[n]))])];
  }
  if (chart.kind === "intervals") {
    return [["", "mean", "low", "high"], chart.rows.map((r) => [r.label, figure(r.mean), figure(r.low), figure(r.high)])];
  }
  if (chart.kind === "graph") {
    return [["latent", "latent", "correlation", "flagged", "mergeable"], chart.edges.slice(0, 200).map(([i, j, r, f, m]) => [i, j, figure(r), f ? "yes" : "no", m ? "yes" : "no"])];
  }
  // A table of every point would help nobody: 24 rows, evenly over the steps of the longest line.
  const longest = chart.series.reduce((a, b) => (b.x.length > a.x.length ? b : a));
  const count = Math.min(24, longest.x.length);
  const steps = Array.from({ length: count }, (_, n) => longest.x[Math.round((n * (longest.x.length - 1)) / Math.max(1, count - 1))]);
  const at = (s, x) => {
    let best = 0;
    for (let n = 1; n < s.x.length; n++) if (Math.abs(s.x[n] - x) <= Math.abs(s.x[best] - x)) best = n;
    return figure(s.y[best]);
  };
  return [[chart.x, ...chart.series.map((s) => s.label)], steps.map((x) => [figure(x), ...chart.series.map((s) => at(s, x))])];
};

const visible = new IntersectionObserver((entries) => {
  for (const entry of entries) {
    entry.target.dataset.seen = entry.isIntersecting ? "1" : "";
    if (entry.isIntersecting) entry.target.draw?.();
  }
}, { rootMargin: "300px 0px" });

const chartFigure = (chart) => {
  const plot = set(make("div", "plot"), { role: "img" });
  const caption = make("figcaption", "", chart.title);
  const legend = make("div", "legend");
  const note = make("p", "note");
  const box = make("figure", `chart ${chart.kind}`, caption, legend, plot, note);
  const values = make("details", "values", make("summary", "", "Values"));
  box.append(values);
  let drawn = null;
  let stale = true;
  const fill = () => {
    plot.setAttribute("aria-label", `${chart.title}: ${chart.spoken}`);
    const named = chart.series ?? chart.groups ?? [];
    const shown = named.length > 1 && named[0].label !== undefined ? named : [];
    legend.replaceChildren(...shown.map((s) => make("span", "", set(make("i", ""), { style: `background: var(--${s.color})` }), s.label)));
    note.textContent = chart.note;
    note.hidden = !chart.note;
    if (values.open) table();
  };
  const table = () => {
    const [head, rows] = valuesOf(chart);
    values.querySelector(".scroll")?.remove();
    values.append(plainTable(head, rows, head.map((_, n) => n), `Values of: ${chart.title}`));
  };
  values.addEventListener("toggle", () => { if (values.open) table(); });
  const draw = async () => {
    if (!stale) return;
    stale = false;
    const Plotly = await plotly();
    if (!Plotly) {
      plot.replaceChildren(make("p", "empty", "No chart library here (pip install plotly and write the report again, or use a newer browser): the values are below."));
      values.open = true;
      return;
    }
    const [traces, how] = drawings[chart.kind](chart);
    const config = { displayModeBar: false, responsive: true, doubleClick: false, showTips: false };
    await Plotly.react(plot, traces, how, config);
    if (!drawn && chart.kind === "graph") plot.on("plotly_click", (e) => { const id = e.points[0].customdata; if (id !== undefined) openLatent(id); });
    drawn = Plotly;
  };
  box.draw = draw;
  box.update = (fresh) => { chart = fresh; stale = true; fill(); if (box.dataset.seen) draw(); };
  themed.push(() => {
    if (drawn && !box.isConnected) return false;
    stale = true;
    if (box.dataset.seen && drawn) draw();
    return true;
  });
  fill();
  visible.observe(box);
  return box;
};
