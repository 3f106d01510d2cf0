// What every part uses. Text from data reaches the page through text nodes only: it is shown, never parsed.
const $ = (id) => document.getElementById(id);
const data = JSON.parse($("data").textContent);

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
const shape = (tag, attributes) => set(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes);
const chip = (latent, ...more) => set(make("a", "chip", String(latent), ...more), { href: `#latent-${latent}`, "aria-label": `Latent ${latent}` });

// 0.1234, 18,432, 1.2e-5; an en dash for what is not known.
const number = (value) => {
  if (value === null || value === undefined) return "–";
  if (Number.isInteger(value) && Math.abs(value) < 1e7) return value.toLocaleString("en");
  const size = Math.abs(value);
  if (size >= 1e3) return size < 1e7 ? Math.round(value).toLocaleString("en") : value.toExponential(2);
  return size < 1e-3 ? value.toExponential(1) : String(Number(value.toPrecision(4)));
};
const percent = (share) => {
  if (share === null || share === undefined) return "–";
  const value = 100 * share;
  return `${value === 0 || value >= 99.95 ? value.toFixed(0) : value >= 1 ? value.toFixed(1) : value.toPrecision(2)} %`;
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
