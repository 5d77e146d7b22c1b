"use strict";
// The rollout browser. Everything shown comes from the data element of the page and is inserted as text, never as markup.
(() => {
  const dataElement = document.getElementById("rollouts-data");
  if (!dataElement) return;
  const data = JSON.parse(dataElement.textContent);
  const byId = (id) => document.getElementById(id);
  const form = byId("filters"), list = byId("rollout-list"), count = byId("rollout-count"), more = byId("rollout-more");
  const fields = ["stage", "arm", "verdict", "seed", "search"];
  const PAGE_SIZE = 10;
  let shown = PAGE_SIZE, matches = [];

  const element = (tag, text, className) => {
    const created = document.createElement(tag);
    if (text !== undefined) created.textContent = text;
    if (className) created.className = className;
    return created;
  };
  const fillSelect = (name, values) => {
    const select = form.elements[name];
    for (const [value, text] of values) {
      const option = element("option", text);
      option.value = value;
      select.append(option);
    }
  };
  const unique = (values) => [...new Set(values)];
  const asOptions = (values) => values.map((value) => [String(value), String(value)]);
  fillSelect("stage", asOptions(unique(data.rows.map((row) => row.stage))));
  fillSelect("arm", data.arms.map((arm, index) => [String(index), arm])
    .filter(([index]) => data.rows.some((row) => row.arms.includes(Number(index)))));
  fillSelect("verdict", asOptions(unique(data.rows.map((row) => row.verdict))));
  fillSelect("seed", asOptions(unique(data.rows.map((row) => row.seed)).sort((a, b) => a - b)));

  const question = (row) => (row.question === undefined ? "" : data.problems[row.question]);
  const searchTexts = new Map();
  const searchText = (row) => {
    if (!searchTexts.has(row)) searchTexts.set(row, `${row.problem}\n${question(row)}\n${row.text}\n${row.reason}`.toLowerCase());
    return searchTexts.get(row);
  };
  const isMatch = (row, filters) =>
    (!filters.stage || row.stage === filters.stage) &&
    (!filters.arm || row.arms.includes(Number(filters.arm))) &&
    (!filters.verdict || row.verdict === filters.verdict) &&
    (!filters.seed || String(row.seed) === filters.seed) &&
    (!filters.search || searchText(row).includes(filters.search.toLowerCase()));

  // Colour strength grows with the square root of the signal: full from 4 nats, a quarter of it at 0.25 nats.
  const tint = (token, value) => {
    const colour = value >= 0 ? "--above" : "--below";
    const share = Math.round(Math.min(1, Math.sqrt(Math.abs(value) / 4)) * 60);
    if (share >= 2) token.style.background = `color-mix(in srgb, var(${colour}) ${share}%, transparent)`;
    if (value <= -2) token.className = "low";
    if (value >= 2) token.className = "high";
  };
  const signed = (value) => `${value < 0 ? "−" : "+"}${Math.abs(value).toFixed(2)}`;

  const tokenText = (row) => {
    const box = element("pre");
    box.dir = "auto";
    row.pieces.forEach((piece, index) => {
      const token = element("span", piece || (index === row.pieces.length - 1 && row.finish === "stop" ? " [end]" : ""));
      tint(token, row.signal[index]);
      token.title = `${signed(row.signal[index])} nats`;
      box.append(token);
    });
    const rest = row.text.slice(row.pieces.join("").length);
    if (rest) box.append(element("span", rest));
    return box;
  };
  const plainText = (row) => {
    const box = element("pre", row.text);
    box.dir = "auto";
    if (row.advantage) {
      const share = Math.round(Math.min(1, Math.abs(row.advantage) / 2) * 40);
      box.style.background = `color-mix(in srgb, var(${row.advantage > 0 ? "--above" : "--below"}) ${share}%, var(--soft))`;
    }
    return box;
  };
  const signalSummary = (row) => {
    const lowest = row.signal.map((value, index) => [value, index]).sort((a, b) => a[0] - b[0]).slice(0, 3)
      .filter(([value]) => value < -0.05).map(([value, index]) => `“${row.pieces[index] || "[end]"}” ${signed(value)}`);
    const mean = row.signal.reduce((sum, value) => sum + value, 0) / Math.max(1, row.signal.length);
    return `dense: mean ${signed(mean)} nats a token` + (lowest.length ? `; least likely under the teacher: ${lowest.join(", ")}` : "");
  };
  const article = (row) => {
    const className = row.verdict === "right" ? "right" : row.verdict === "not graded" ? "plain" : "wrong";
    const box = element("article", undefined, className);
    const head = element("p");
    head.append(element("strong", `${{ right: "✓ ", wrong: "✗ " }[className] || ""}${row.verdict}`));
    const facts = [row.stage, typeof row.step === "number" ? `step ${row.step}` : row.step, `seed ${row.seed}`, row.reason, `problem ${row.problem}`,
      `sample ${row.sample}`, `${row.tokens} tokens`, row.finish === "length" && row.verdict === "right" ? "cut at max_tokens" : "", row.arms.map((arm) => data.arms[arm]).join(", ")];
    head.append(` ${facts.filter(Boolean).join(" · ")}`);
    box.append(head);
    if (question(row)) {
      const problem = element("pre", question(row), "problem");
      problem.dir = "auto";
      box.append(problem);
    }
    box.append(row.pieces ? tokenText(row) : plainText(row));
    if (row.cut) box.append(element("p", `… ${row.cut.toLocaleString("en")} more characters`, "note"));
    if (row.pieces) box.append(element("p", signalSummary(row), "note"));
    else if (row.advantage !== undefined) box.append(element("p", `sparse: advantage ${signed(row.advantage)}, the same for every token`, "note"));
    return box;
  };

  const readForm = () => Object.fromEntries(fields.map((name) => [name, form.elements[name].value.trim()]));
  const draw = () => {
    list.replaceChildren(...matches.slice(0, shown).map(article));
    more.hidden = shown >= matches.length;
    count.textContent = `${matches.length.toLocaleString("en")} of ${data.rows.length.toLocaleString("en")} rollouts match; ` +
      (matches.length > shown ? `the first ${shown} are listed` : matches.length ? "all are listed" : "none is listed");
  };
  const update = () => {
    const filters = readForm();
    matches = data.rows.filter((row) => isMatch(row, filters));
    shown = PAGE_SIZE;
    draw();
    const query = new URLSearchParams(Object.entries(filters).filter(([, value]) => value));
    try {
      history.replaceState(null, "", String(query) ? `#rollouts?${query}` : location.pathname + location.search);
    } catch { /* some browsers refuse this for a page opened from a file */ }
  };
  const restoreFilters = () => {
    const query = new URLSearchParams(location.hash.split("?")[1] || "");
    for (const name of fields) if (query.has(name)) form.elements[name].value = query.get(name);
    return String(query) !== "";
  };
  let timer;
  form.addEventListener("input", () => {
    clearTimeout(timer);
    timer = setTimeout(update, 120);
  });
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("reset", () => setTimeout(update, 0));
  more.addEventListener("click", () => {
    const first = shown;
    shown += PAGE_SIZE;
    draw();
    const next = list.children[first];
    if (next) {
      next.tabIndex = -1;
      next.focus();
    }
  });
  if (restoreFilters()) update();
  else {
    matches = data.rows;
    draw();
  }
  byId("rollouts").classList.add("ready");
})();
