// The table of pairs: filters, and both latents' contexts side by side under a row.
const openPairs = new Set();
const pairs = (box) => {
  const PAGE = 15;
  const rows = [...box.querySelectorAll("tbody tr")];
  const body = box.querySelector("tbody");
  const count = box.querySelector(".count");
  const all = count.textContent;
  const more = box.querySelector("button.more");
  const [search, duplicate] = box.querySelectorAll("input");
  let limit = PAGE;

  const detail = ({ pair, verdict, cost }) => {
    const words = cost === "–"
      ? "Not tested: too few held-out tokens fired on this pair, or it is too far down the list."
      : `One latent in the place of both would cost ${cost} of the weaker one's contribution on held-out tokens: ${verdict}.`;
    const sides = pair.split("-").map((id) => {
      const side = make("article", "card");
      fillCard(side, Number(id), "side");
      return side;
    });
    const cell = make("td", "", make("p", "note", words), make("div", "sides", ...sides));
    cell.colSpan = box.querySelectorAll("th").length;
    return make("tr", "detail", cell);
  };
  const draw = () => {
    const id = search.value.trim();
    const found = rows.filter(({ dataset }) => (id === "" || dataset.pair.split("-").includes(id))
      && (!duplicate.checked || dataset.verdict === "duplicate"));
    const none = make("td", "note", "No pair matches.");
    none.colSpan = box.querySelectorAll("th").length;
    body.replaceChildren(...found.slice(0, limit).flatMap((row) => {
      const open = openPairs.has(row.dataset.pair);
      row.querySelector("button").setAttribute("aria-expanded", String(open));
      return open ? [row, row.detail ??= detail(row.dataset)] : [row];
    }), ...(found.length ? [] : [make("tr", "", none)]));
    more.hidden = found.length <= limit;
    count.textContent = found.length === rows.length ? all : `${found.length} of ${rows.length} pairs`;
  };
  body.addEventListener("click", (e) => {
    const row = e.target.closest("button.open[aria-expanded]")?.closest("tr");
    if (!row) return;
    if (!openPairs.delete(row.dataset.pair)) openPairs.add(row.dataset.pair);
    draw();
  });
  more.addEventListener("click", () => { limit += 4 * PAGE; draw(); });
  box.addEventListener("input", draw);
  draw();
};
