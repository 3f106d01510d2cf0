// Draws the figures that transcoder/reporting/charts.py made, by plotly.js, when they come into view.
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
    // The page's policy knows the hash of exactly this text. It sends nothing anywhere by itself.
    document.head.append(make("script", "", text));
    return window.Plotly ?? null;
  })();
  return library;
};

// "--c0" is a color of the style sheet, "--c0/0.2" the same with opacity.
const color = (name) => {
  const [variable, opacity] = name.split("/");
  const hex = getComputedStyle(document.documentElement).getPropertyValue(variable).trim();
  return opacity ? `rgba(${[1, 3, 5].map((n) => parseInt(hex.slice(n, n + 2), 16)).join(",")},${opacity})` : hex;
};
const colored = (json) => JSON.parse(json, (key, value) => (typeof value === "string" && /^--[a-z]/.test(value) && (/color$/.test(key) || /^\d+$/.test(key)) ? color(value) : value));

const visible = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries) {
    target.dataset.seen = isIntersecting ? "1" : "";
    target.draw();
  }
}, { rootMargin: "300px 0px" });

const chart = (box) => {
  const plot = box.querySelector(".plot");
  let stale = true;
  box.draw = async () => {
    if (!stale || !box.dataset.seen) return;
    stale = false;
    const Plotly = await plotly();
    if (!Plotly) {
      plot.replaceChildren(make("p", "empty", "No chart library here (pip install plotly and write the report again, or use a newer browser): the values are below."));
      box.querySelector(".values").open = true;
      return;
    }
    const { data: traces, layout } = colored(box.querySelector("script").textContent);
    layout.template = colored(JSON.stringify(data.look));
    await Plotly.react(plot, traces, layout, { displayModeBar: false, responsive: true, doubleClick: false, showTips: false });
  };
  box.redraw = () => { stale = true; box.draw(); };
  // New values from a live page: everything but the plot itself is taken over.
  box.renew = (now) => {
    const fresh = document.importNode(now, true);
    plot.setAttribute("aria-label", fresh.querySelector(".plot").getAttribute("aria-label"));
    fresh.querySelector(".values").open = box.querySelector(".values").open;
    fresh.querySelector(".plot").replaceWith(plot);
    box.replaceChildren(...fresh.childNodes);
    box.redraw();
  };
  visible.observe(box);
};
