// Curves over steps: the values at the pointer, smoothing, a logarithmic axis. Without this script the figures are complete.
(() => {
  const form = document.getElementById("curve-options"), status = document.getElementById("curve-values");
  const figures = [...document.querySelectorAll("svg[data-curve]")].map((svg) => ({ svg, ...JSON.parse(svg.dataset.curve) }));
  if (!figures.length) return;

  const element = (tag, attributes, parent, text) => {
    const created = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) created.setAttribute(name, value);
    if (text !== undefined) created.textContent = text;
    return parent.appendChild(created);
  };
  const shown = (value) => {
    const small = value !== 0 && Math.abs(value) < 1e-3, text = small ? value.toExponential(2).replace(/\.?0+e/, "e") : String(Number(value.toPrecision(3)));
    return text.replaceAll("-", "−");
  };

  // The position of a value in the SVG: linearly between the ends of the axis, or between their logarithms.
  const along = (value, [low, high], [start, end]) => start + ((value - low) / (high - low)) * (end - start);
  const acrossOf = (figure) => (step) => along(step, figure.x, [figure.frame[0], figure.frame[2]]);
  const upOf = (figure) => (value) => {
    const ends = [figure.frame[1], figure.frame[3]];
    return figure.log ? along(Math.log10(value), figure.log.map(Math.log10), ends) : along(value, figure.y, ends);
  };
  const smoothed = (values, size) => values.map((_, index) => {
    const last = values.slice(Math.max(0, index - size + 1), index + 1);
    return last.reduce((sum, value) => sum + value, 0) / last.length;
  });

  // Redrawing with other options ---------------------------------------------------------------------------------------
  const path = (points) => points.map(([x, y], index) => `${index ? "L" : "M"}${x.toFixed(1)} ${y.toFixed(1)}`).join("");
  const logTicks = ([low, high]) => {
    const steps = Math.log10(high / low) > 3 ? [1] : [1, 2, 5], ticks = [];
    for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++)
      for (const step of steps) ticks.push(Number(`${step}e${power}`));
    const inside = ticks.filter((tick) => tick >= low && tick <= high), every = Math.ceil(inside.length / 6);
    return inside.length < 2 ? [low, high] : inside.filter((_, index) => index % every === 0);
  };
  const drawLogAxis = (figure) => {
    const [left, , right] = figure.frame, up = upOf(figure);
    figure.ticks = element("g", {}, figure.svg);
    figure.svg.prepend(figure.ticks);
    for (const tick of logTicks(figure.log)) {
      element("path", { d: `M${left} ${up(tick)}H${right}`, stroke: "var(--line)", "stroke-width": 0.6 }, figure.ticks);
      element("text", { x: left - 4, y: up(tick) + 3, "text-anchor": "end", "font-size": 9, fill: "currentColor" }, figure.ticks, shown(tick));
    }
  };
  const redraw = (figure, size, log) => {
    const { svg } = figure, all = figure.lines.flatMap((line) => [...line.y, ...(line.low || []), ...(line.high || [])]);
    const low = Math.min(...all), high = Math.max(...all);
    figure.ticks?.remove();
    figure.log = log && low > 0 && high > 3 * low ? [low / 1.1, high * 1.1] : null; // where a logarithm shows something
    const axis = svg.querySelector(".values"), across = acrossOf(figure), up = upOf(figure);
    axis.style.display = figure.log ? "none" : "";
    if (figure.log) drawLogAxis(figure);
    figure.lines.forEach((line, place) => {
      line.shown = smoothed(line.y, size);
      const points = line.x.map((x, index) => [across(x), up(line.shown[index])]);
      const group = svg.querySelector(`.line${place}`), band = svg.querySelector(`.band${place}`), own = size === 1 && !figure.log;
      group.querySelector("path").setAttribute("d", path(points));
      for (const part of [...group.querySelectorAll("use"), ...(band ? [band] : [])]) part.style.display = own ? "" : "none";
    });
  };

  // Values at a step ---------------------------------------------------------------------------------------------------
  const rows = (figure, step) => figure.lines.map((line) => [line, line.x.indexOf(step)]).filter(([, index]) => index >= 0);
  const hide = (group) => {
    for (const figure of group.figures) {
      figure.cursor?.remove();
      figure.box?.remove();
    }
  };
  const mark = (figure, step) => {
    const x = acrossOf(figure)(step), up = upOf(figure), [, bottom, , top] = figure.frame;
    figure.cursor = element("g", {}, figure.svg);
    element("path", { d: `M${x} ${bottom}V${top}`, stroke: "var(--quiet)", "stroke-width": 0.8, "stroke-dasharray": "2 2" }, figure.cursor);
    for (const [line, index] of rows(figure, step))
      element("circle", { cx: x, cy: up(line.shown[index]), r: 3, fill: `var(--series${line.colour})` }, figure.cursor);
  };
  const tell = (figure, step) => {
    const box = (figure.box = document.createElement("div"));
    box.className = "values-box";
    box.append(`step ${step}`);
    for (const [line, index] of rows(figure, step)) {
      const row = document.createElement("div"), dot = document.createElement("i");
      dot.style.background = `var(--series${line.colour})`;
      const range = line.low ? ` (${shown(line.low[index])} to ${shown(line.high[index])})` : "";
      row.append(dot, `${shown(line.shown[index])}${range} ${line.label}`);
      box.append(row);
    }
    if (step > (figure.x[0] + figure.x[1]) / 2) box.style.left = "15%";
    else box.style.right = "2%";
    figure.svg.parentElement.append(box);
  };
  const show = (group, step, told) => {
    hide(group);
    group.step = step;
    for (const figure of group.figures) if (rows(figure, step).length) mark(figure, step);
    for (const figure of told) if (rows(figure, step).length) tell(figure, step);
  };
  const nearest = (steps, wanted) => steps.reduce((best, step) => (Math.abs(step - wanted) < Math.abs(best - wanted) ? step : best));

  for (const container of new Set(figures.map((figure) => figure.svg.closest(".figures")))) {
    const group = { figures: figures.filter((figure) => container.contains(figure.svg)) };
    group.steps = [...new Set(group.figures.flatMap((figure) => figure.lines.flatMap((line) => line.x)))].sort((a, b) => a - b);
    container.tabIndex = 0;
    container.setAttribute("role", "group");
    container.setAttribute("aria-label", "Curves: left and right arrow keys read the values at a step");
    for (const figure of group.figures) {
      const point = (event) => {
        const area = figure.svg.getBoundingClientRect(), width = figure.svg.viewBox.baseVal.width;
        const across = ((event.clientX - area.left) / area.width) * width;
        const wanted = along(across, [figure.frame[0], figure.frame[2]], figure.x);
        const steps = group.steps.filter((step) => rows(figure, step).length);
        show(group, nearest(steps, wanted), [figure]);
      };
      figure.svg.addEventListener("pointermove", point);
      figure.svg.addEventListener("pointerdown", point);
      figure.svg.addEventListener("pointerleave", () => hide(group));
    }
    container.addEventListener("blur", () => hide(group));
    container.addEventListener("keydown", (event) => {
      const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (event.key === "Escape") hide(group);
      if (!move) return;
      event.preventDefault();
      const at = group.steps.indexOf(group.step), next = at < 0 ? (move > 0 ? 0 : group.steps.length - 1) : at + move;
      show(group, group.steps[Math.min(group.steps.length - 1, Math.max(0, next))], group.figures);
      const told = group.figures.map((figure) => [figure, rows(figure, group.step)]).filter(([, found]) => found.length);
      const values = (found) => found.map(([line, index]) => `${line.label} ${shown(line.shown[index])}`).join(", ");
      if (status) status.textContent = `step ${group.step}: ${told.map(([figure, found]) => `${figure.title}: ${values(found)}`).join("; ")}`;
    });
  }

  const update = () => {
    const size = form ? Number(form.elements.smoothing.value) : 1, log = form?.elements.axis.value === "log";
    for (const figure of figures) redraw(figure, size, log);
  };
  for (const line of figures.flatMap((figure) => figure.lines)) line.shown = line.y;
  if (form) {
    form.hidden = false;
    form.addEventListener("input", update);
    form.addEventListener("submit", (event) => event.preventDefault());
    if (form.elements.smoothing.value !== "1" || form.elements.axis.value !== "linear") update(); // a browser may keep them over a reload
  }
})();
