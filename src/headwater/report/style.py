"""The report's style sheet."""

from __future__ import annotations

STYLE = """
:root { color-scheme: light dark; --page: #fff; --text: #1b1f24; --quiet: #57606a; --line: #d0d7de; --soft: #f6f8fa;
  --right: #00694d; --wrong: #a84300; --link: #00588c; --above: #56b4e9; --below: #e69f00; --series0: #0072b2; }
@media (prefers-color-scheme: dark) { :root { --page: #0f1317; --text: #e6e9ec; --quiet: #9aa4ae; --line: #343c45;
  --soft: #181d23; --right: #3cc79c; --wrong: #ff9a52; --link: #7cc4f0; --above: #2f86b8; --below: #b87400;
  --series0: #46a3dc; --series5: #9bd7f7; } }
* { box-sizing: border-box; }
html { scroll-padding-top: 3rem; }
body { margin: 0 auto; max-width: 82rem; padding: 0 1.25rem 4rem; background: var(--page); color: var(--text);
  font: 16px/1.5 system-ui, sans-serif; }
a { color: var(--link); }
a.skip { position: absolute; left: -99rem; }
a.skip:focus { left: 1rem; top: 0.25rem; background: var(--page); z-index: 3; padding: 0.25rem 0.5rem; }
nav { position: sticky; top: 0; z-index: 2; background: var(--page); border-bottom: 1px solid var(--line);
  margin: 0 -1.25rem; padding: 0 1.25rem; overflow-x: auto; white-space: nowrap; font-size: 0.8125rem; }
nav ul { display: flex; flex-wrap: wrap; gap: 0.15rem 0.8rem; list-style: none; margin: 0; padding: 0.45rem 0; }
nav a { text-decoration: none; }
nav a:hover { text-decoration: underline; }
h1 { font-size: 1.6rem; margin: 1rem 0 0; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 0.5rem; padding-top: 0.5rem; border-top: 1px solid var(--line); }
h3 { font-size: 1.05rem; margin: 1.75rem 0 0.25rem; }
.verdict { font-size: 1.1rem; padding: 0.75rem 1rem; background: var(--soft); border-left: 4px solid var(--series0);
  overflow-wrap: anywhere; }
.verdict > strong { display: block; font-size: 1.2rem; }
.verdict p { font-size: 0.9rem; margin: 0; }
ul.chips { list-style: none; display: flex; flex-wrap: wrap; gap: 0.5rem; padding: 0; margin: 0.5rem 0; }
ul.chips li { background: var(--page);
  border: 1px solid var(--line); border-radius: 0.4rem; padding: 0.2rem 0.6rem; font-size: 0.9rem; }
.note { color: var(--quiet); font-size: 0.875rem; max-width: 60rem; margin: 0.4rem 0; }
.wide { overflow-x: auto; margin: 0.75rem 0; }
:focus-visible { outline: 2px solid var(--series0); outline-offset: 2px; }
table { border-collapse: collapse; font-size: 0.875rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding: 0.25rem 0; }
th, td { padding: 0.3rem 0.6rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
td.number { text-align: right; white-space: nowrap; }
td.said { white-space: nowrap; }
th.number { text-align: right; }
thead th { color: var(--quiet); font-weight: 600; vertical-align: bottom; }
tbody th { font-weight: 600; position: sticky; left: 0; background: var(--page); z-index: 1; }
th .text, th .warn { display: block; font-weight: 400; font-size: 0.8rem; color: var(--quiet); min-width: 9rem; }
th .warn { color: var(--wrong); overflow-wrap: anywhere; }
td.forest { min-width: 11rem; position: relative; }
td.forest span { position: absolute; inset: 0 0.6rem; --row: 0.95rem; }
td.forest i { position: absolute; }
td.forest .level { border-left: 1.5px dashed var(--quiet); top: 0; bottom: -1px; }
td.forest .bar { top: calc(var(--row) - 1.5px); height: 3px; background: var(--series0); border-radius: 2px; }
td.forest .mean { width: 0.42rem; height: 0.42rem; margin-left: -0.21rem; top: calc(var(--row) - 0.21rem); border-radius: 50%;
  background: var(--series0); }
td.forest .seed { width: 1.5px; height: 0.8rem; background: var(--text); opacity: 0.6; top: calc(var(--row) - 0.4rem); }
tr.group th { padding-top: 0.9rem; color: var(--quiet); position: static; }
th.axis { min-width: 11rem; }
th.axis span { display: flex; justify-content: space-between; font-weight: 400; }
.figures, .pair { display: grid; gap: 0.75rem 1.25rem;
  grid-template-columns: repeat(auto-fill, minmax(min(19rem, 100%), 1fr)); }
.pair { grid-template-columns: repeat(auto-fill, minmax(min(34rem, 100%), 1fr)); }
figure { margin: 0; max-width: 40rem; }
.pair figure { min-width: 30rem; }
.large figure { max-width: 52rem; min-width: 40rem; }
figure svg { display: block; width: 100%; height: auto; }
svg * { stroke-linejoin: round; stroke-linecap: butt; }
svg text { font-family: system-ui, sans-serif; }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: 0.25rem 1.25rem; padding: 0; margin: 0.25rem 0 0.5rem;
  font-size: 0.875rem; }
.legend svg { width: 2.6rem; height: 0.85rem; vertical-align: middle; }
ul.why { margin: 0; padding-left: 1rem; max-width: 52rem; }
details { margin: 0.4rem 0; }
summary { cursor: pointer; padding: 0.2rem 0; overflow-wrap: anywhere; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: var(--soft); padding: 0.6rem 0.8rem; margin: 0.3rem 0;
  font-size: 0.8125rem; unicode-bidi: isolate; }
pre.asked { background: none; border: 1px solid var(--line); }
pre .low { text-decoration: underline wavy; }
pre .high { text-decoration: underline; }
article { border-left: 3px solid var(--line); padding-left: 0.75rem; margin: 0.75rem 0; }
article p { margin: 0; font-size: 0.875rem; overflow-wrap: anywhere; }
article.right { border-color: var(--right); }
article.wrong { border-color: var(--wrong); }
article.right strong { color: var(--right); }
article.wrong strong { color: var(--wrong); }
#rollouts form, #rollouts .scale { display: none; }
#rollouts.ready form { display: flex; flex-wrap: wrap; gap: 0.5rem 1rem; align-items: end; margin: 0.75rem 0; }
#rollouts.ready .scale { display: block; }
#rollouts.ready .without { display: none; }
form label { display: flex; flex-direction: column; font-size: 0.8rem; color: var(--quiet); max-width: 100%; }
form select, form input, button { font: inherit; font-size: 0.9rem; color: var(--text); background: var(--page);
  border: 1px solid var(--quiet); border-radius: 0.3rem; padding: 0.3rem 0.5rem; max-width: 100%; min-height: 2.1rem; }
.scale span { color: var(--text); padding: 0.05rem 0.4rem; border-radius: 0.2rem; }
.scale .a { background: color-mix(in srgb, var(--above) 55%, transparent); text-decoration: underline; }
.scale .b { background: color-mix(in srgb, var(--below) 55%, transparent); text-decoration: underline wavy; }
@media screen { main > section { content-visibility: auto; contain-intrinsic-size: auto 50rem; } }
@media (max-width: 40rem) { body { padding: 0 0.75rem 3rem; } nav { margin: 0 -0.75rem; padding: 0 0.75rem; }
  nav ul { flex-wrap: nowrap; gap: 1.1rem; }
  th .text { min-width: 7rem; } td.forest, th.axis { min-width: 9rem; }
  .told table, .told caption, .told tbody, .told tr, .told th, .told td { display: block; } .told thead { display: none; }
  .told tr { border-bottom: 1px solid var(--line); padding: 0.4rem 0; } .told td.said { white-space: normal; }
  .told th, .told td { border: 0; padding: 0.1rem 0; position: static; } }
@media print { html { font-size: 10.5px; } body { max-width: none; font-size: 1rem; padding: 0; } .wide { overflow: visible; }
  nav, a.skip, #rollouts form, #rollouts button { display: none !important; }
  th, td { padding: 0.2rem 0.4rem; } tbody th { position: static; } td.forest span { --row: 0.85rem; }
  td.forest, th.axis { min-width: 8rem; } td.forest i { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  .figures { grid-template-columns: repeat(3, 1fr); } .pair { grid-template-columns: repeat(2, 1fr); }
  .large figure, .pair figure { min-width: 0; }
  tr, figure, article { break-inside: avoid; } h2, h3 { break-after: avoid; } }
"""
