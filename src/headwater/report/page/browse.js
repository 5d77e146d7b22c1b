"use strict";
// The browser of rollouts. Everything shown comes from the page's data element and is set as text, never as markup.
(() => {
  const holder = document.getElementById("rollouts-data");
  if (!holder) return;
  const data = JSON.parse(holder.textContent);
  const byId = (id) => document.getElementById(id);
  const form = byId("filters"), list = byId("rollout-list"), told = byId("rollout-count"), more = byId("rollout-more");
  const fields = ["stage", "arm", "verdict", "seed", "search"];
  const STEP = 10;
  let shown = STEP, found = [];

  const make = (tag, text, kind) => {
    const element = document.createElement(tag);
    if (text !== undefined) element.textContent = text;
    if (kind) element.className = kind;
    return element;
  };
  const fill = (name, values) => {
    const select = form.elements[name];
    for (const [value, text] of values) {
      const option = make("option", text);
      option.value = value;
      select.append(option);
    }
  };
  const unique = (values) => [...new Set(values)];
  const plain = (values) => values.map((value) => [String(value), String(value)]);
  fill("stage", plain(unique(data.rows.map((row) => row.s))));
  fill("arm", data.arms.map((arm, place) => [String(place), arm]).filter(([place]) => data.rows.some((r) => r.a.includes(+place))));
  fill("verdict", plain(unique(data.rows.map((row) => row.v))));
  fill("seed", plain(unique(data.rows.map((row) => row.d)).sort((a, b) => a - b)));

  const question = (row) => (row.q === undefined ? "" : data.problems[row.q]);
  const haystack = new Map();
  const textOf = (row) => {
    if (!haystack.has(row)) haystack.set(row, `${row.p}\n${question(row)}\n${row.c}\n${row.r}`.toLowerCase());
    return haystack.get(row);
  };
  const fits = (row, want) =>
    (!want.stage || row.s === want.stage) &&
    (!want.arm || row.a.includes(Number(want.arm))) &&
    (!want.verdict || row.v === want.verdict) &&
    (!want.seed || String(row.d) === want.seed) &&
    (!want.search || textOf(row).includes(want.search.toLowerCase()));

  // How strong a colour is: 4 nats and more are the full one, a quarter nat a fourth of it.
  const tint = (element, value) => {
    const kind = value >= 0 ? "--above" : "--below";
    const share = Math.round(Math.min(1, Math.sqrt(Math.abs(value) / 4)) * 60);
    if (share >= 2) element.style.background = `color-mix(in srgb, var(${kind}) ${share}%, transparent)`;
    if (value <= -2) element.className = "low";
    if (value >= 2) element.className = "high";
  };
  const signed = (value) => `${value < 0 ? "−" : "+"}${Math.abs(value).toFixed(2)}`;

  const dense = (row) => {
    const box = make("pre");
    box.dir = "auto";
    row.w.forEach((piece, place) => {
      const token = make("span", piece || (place === row.w.length - 1 && row.f === "stop" ? " [end]" : ""));
      tint(token, row.x[place]);
      token.title = `${signed(row.x[place])} nats`;
      box.append(token);
    });
    const rest = row.c.slice(row.w.join("").length);
    if (rest) box.append(make("span", rest));
    return box;
  };
  const whole = (row) => {
    const box = make("pre", row.c);
    box.dir = "auto";
    if (row.g) {
      const share = Math.round(Math.min(1, Math.abs(row.g) / 2) * 40);
      box.style.background = `color-mix(in srgb, var(${row.g > 0 ? "--above" : "--below"}) ${share}%, var(--soft))`;
    }
    return box;
  };
  const extremes = (row) => {
    const order = row.x.map((value, place) => [value, place]).sort((a, b) => a[0] - b[0]).slice(0, 3);
    const said = order.filter(([value]) => value < -0.05).map(([value, place]) => `“${row.w[place] || "[end]"}” ${signed(value)}`);
    const mean = row.x.reduce((sum, value) => sum + value, 0) / Math.max(1, row.x.length);
    return `dense: mean ${signed(mean)} nats a token` + (said.length ? `; the teacher likes least ${said.join(", ")}` : "");
  };
  const article = (row) => {
    const kind = row.v === "right" ? "right" : row.v === "wrong" ? "wrong" : "plain";
    const box = make("article", undefined, kind);
    const head = make("p");
    head.append(make("strong", row.v === "right" ? "✓ right" : row.v === "wrong" ? "✗ wrong" : "not graded"));
    const facts = [row.s, typeof row.t === "number" ? `step ${row.t}` : row.t, `seed ${row.d}`, row.r, `problem ${row.p}`,
      `sample ${row.i}`, `${row.k} tokens`, row.f === "length" ? "cut at the limit" : "", row.a.map((arm) => data.arms[arm]).join(", ")];
    head.append(` ${facts.filter(Boolean).join(" · ")}`);
    box.append(head);
    if (question(row)) {
      const asked = make("pre", question(row), "asked");
      asked.dir = "auto";
      box.append(asked);
    }
    box.append(row.w ? dense(row) : whole(row));
    if (row.m) box.append(make("p", `… ${row.m.toLocaleString("en")} more characters`, "note"));
    if (row.w) box.append(make("p", extremes(row), "note"));
    else if (row.g !== undefined) box.append(make("p", `sparse: advantage ${signed(row.g)}, the same for every token`, "note"));
    return box;
  };

  const wanted = () => Object.fromEntries(fields.map((name) => [name, form.elements[name].value.trim()]));
  const draw = () => {
    list.replaceChildren(...found.slice(0, shown).map(article));
    more.hidden = shown >= found.length;
    told.textContent = `${found.length.toLocaleString("en")} of ${data.rows.length.toLocaleString("en")} rollouts match; ` +
      (found.length > shown ? `the first ${shown} are listed` : found.length ? "all are listed" : "none is listed");
  };
  const update = () => {
    const want = wanted();
    found = data.rows.filter((row) => fits(row, want));
    shown = STEP;
    draw();
    const kept = new URLSearchParams(Object.entries(want).filter(([, value]) => value));
    try {
      history.replaceState(null, "", String(kept) ? `#rollouts?${kept}` : location.pathname + location.search);
    } catch { /* a page opened from a file may not change its address everywhere */ }
  };
  const recall = () => {
    const kept = new URLSearchParams(location.hash.split("?")[1] || "");
    for (const name of fields) if (kept.has(name)) form.elements[name].value = kept.get(name);
    return String(kept) !== "";
  };
  let waiting;
  form.addEventListener("input", () => {
    clearTimeout(waiting);
    waiting = setTimeout(update, 120);
  });
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("reset", () => setTimeout(update, 0));
  more.addEventListener("click", () => {
    const first = shown;
    shown += STEP;
    draw();
    const next = list.children[first];
    if (next) {
      next.tabIndex = -1;
      next.focus();
    }
  });
  if (recall()) update();
  else {
    found = data.rows;
    draw();
  }
  byId("rollouts").classList.add("ready");
})();
