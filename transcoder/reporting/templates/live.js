// A page that a watched run serves asks for news every few seconds; one from disk never asks anybody anything.
const EVERY = 3000;
const live = () => {
  if (!data.live) return;
  const dot = make("span", "pill live", "live");
  $("head").querySelector(".facts")?.append(dot);
  let tag = null;
  const ask = async () => {
    if (!document.hidden) {
      try {
        const answer = await fetch("data.json", { headers: tag ? { "If-None-Match": tag } : {}, cache: "no-store" });
        if (answer.status === 200) {
          tag = answer.headers.get("ETag");
          const fresh = await answer.json();
          store.version = fresh.version;
          drawAll(fresh);
          say("The report was updated.");
        }
        state("live", "good");
      } catch {
        // The server was stopped, or the machine slept: what is here stays, and the next try may succeed.
        state("not connected", "warn");
      }
    }
    setTimeout(ask, EVERY);
  };
  const state = (words, look) => {
    const place = $("head").querySelector(".live") ?? $("head").querySelector(".facts")?.appendChild(make("span", ""));
    if (place) { place.className = `pill live ${look}`; place.textContent = words; }
  };
  state("live", "good");
  dot.remove();
  setTimeout(ask, EVERY);
};
