// What every part uses. Text from data reaches the page through text nodes only: it is shown, never parsed.
const $ = (id) => document.getElementById(id);

const make = (tag, look, ...children) => {
  const node = document.createElement(tag);
  if (look) node.className = look;
  node.append(...children);
  return node;
};
const set = (node, attributes) => {
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  return node;
};
const button = (words, look, act) => {
  const node = make("button", look, words);
  node.type = "button";
  node.addEventListener("click", act);
  return node;
};
const shape = (tag, attributes) => set(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes);

// 0.1234, 18,432, 1.2e-5; an en dash for what is not known.
const figure = (value) => {
  if (value === null || value === undefined) return "–";
  if (Number.isInteger(value) && Math.abs(value) < 1e7) return value.toLocaleString("en");
  const size = Math.abs(value);
  if (size >= 1e3) return size < 1e7 ? Math.round(value).toLocaleString("en") : value.toExponential(2);
  return size < 1e-3 ? value.toExponential(1) : String(Number(value.toPrecision(4)));
};
const share = (value) => {
  if (value === null || value === undefined) return "–";
  const percent = 100 * value;
  return `${percent === 0 || percent >= 99.95 ? percent.toFixed(0) : percent >= 1 ? percent.toFixed(1) : percent.toPrecision(2)} %`;
};

// base64 of gzip, as text. Big texts are unpacked when they are needed, and by the browser's own code.
const unpack = async (text) => {
  const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).text();
};
const parsed = document.readyState === "loading"
  ? new Promise((done) => document.addEventListener("DOMContentLoaded", done, { once: true }))
  : Promise.resolve();
const rest = () => new Promise((done) => setTimeout(done, 0));

const say = (words) => { $("said").textContent = words; };

/* ---- light and dark ---- */
const system = matchMedia("(prefers-color-scheme: dark)");
const remembered = () => {
  try { return localStorage.getItem("transcoder-theme"); } catch { return null; }
};
let themed = [];
const isDark = () => (document.documentElement.dataset.theme ?? (system.matches ? "dark" : "light")) === "dark";
const setTheme = (theme) => {
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
  else delete document.documentElement.dataset.theme;
  retheme();
};
// What has left the page says so (false) and is forgotten: a live page may stay open for days.
const retheme = () => { themed = themed.filter((redraw) => redraw() !== false); };
setTheme(remembered());
system.addEventListener("change", retheme);
const themeButton = () => {
  const node = button("", "theme", () => {
    const theme = isDark() ? "light" : "dark";
    try { localStorage.setItem("transcoder-theme", theme); } catch { /* a page from disk may not remember */ }
    setTheme(theme);
  });
  let put = false;
  const name = () => {
    if (put && !node.isConnected) return false;
    put = node.isConnected;
    node.textContent = isDark() ? "☀ Light" : "☾ Dark";
    node.setAttribute("aria-label", isDark() ? "Use light colours" : "Use dark colours");
    return true;
  };
  themed.push(name);
  name();
  return node;
};
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
const faint = (name, alpha) => {
  const hex = colour(name);
  return `rgba(${[1, 3, 5].map((n) => parseInt(hex.slice(n, n + 2), 16)).join(",")},${alpha})`;
};
