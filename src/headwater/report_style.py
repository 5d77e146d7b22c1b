"""The report's style sheet."""

from __future__ import annotations

STYLE = """
:root { color-scheme: light dark; --page: #fff; --text: #1b1f24; --quiet: #57606a; --line: #d0d7de; --soft: #f6f8fa;
  --right: #00694d; --wrong: #a84300; }
@media (prefers-color-scheme: dark) { :root { --page: #0f1317; --text: #e6e9ec; --quiet: #9aa4ae; --line: #343c45;
  --soft: #181d23; --right: #3cc79c; --wrong: #ff9a52;
  --series0: #46a3dc; --series5: #9bd7f7; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 78rem; padding: 1rem 1.25rem 4rem; background: var(--page); color: var(--text);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; margin: 0.5rem 0 0; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 0.5rem; padding-top: 0.5rem; border-top: 1px solid var(--line); }
h3 { font-size: 1.05rem; margin: 1.75rem 0 0.25rem; }
.verdict { font-size: 1.1rem; padding: 0.75rem 1rem; background: var(--soft); border-left: 4px solid #0072b2;
  overflow-wrap: anywhere; }
.note { color: var(--quiet); font-size: 0.875rem; max-width: 60rem; margin: 0.4rem 0; }
.wide { overflow-x: auto; margin: 0.75rem 0; }
.wide:focus-visible, summary:focus-visible { outline: 2px solid #0072b2; outline-offset: 2px; }
table { border-collapse: collapse; font-size: 0.875rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding: 0.25rem 0; }
th, td { padding: 0.3rem 0.6rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
td.number { text-align: right; white-space: nowrap; }
td.said { white-space: nowrap; }
th.number { text-align: right; }
thead th { color: var(--quiet); font-weight: 600; vertical-align: bottom; }
tbody th { font-weight: 600; position: sticky; left: 0; background: var(--page); }
th .text, th .warn { display: block; font-weight: 400; font-size: 0.8rem; color: var(--quiet); min-width: 9rem; }
th .warn { color: var(--wrong); overflow-wrap: anywhere; }
.figures { display: grid; gap: 0.75rem 1.25rem; 
  grid-template-columns: repeat(auto-fit, minmax(min(19rem, 100%), 1fr)); }
.figures.small { grid-template-columns: repeat(auto-fill, minmax(min(16rem, 100%), 1fr)); }
figure { margin: 0; max-width: 36rem; }
figure svg { display: block; width: 100%; height: auto; }
svg text { font-family: system-ui, sans-serif; }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: 0.25rem 1.25rem; padding: 0; margin: 0.25rem 0 0.5rem;
  font-size: 0.875rem; }
.legend svg { width: 2.6rem; height: 0.85rem; vertical-align: middle; }
ul.why { margin: 0; padding-left: 1rem; max-width: 52rem; }
details { margin: 0.4rem 0; }
summary { cursor: pointer; padding: 0.2rem 0; overflow-wrap: anywhere; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: var(--soft); padding: 0.6rem 0.8rem; margin: 0.3rem 0;
  font-size: 0.8125rem; unicode-bidi: isolate; }
article { border-left: 3px solid; padding-left: 0.75rem; margin: 0.75rem 0; }
article p { margin: 0; font-size: 0.875rem; overflow-wrap: anywhere; }
article.right { border-color: var(--right); }
article.wrong { border-color: var(--wrong); }
article.right strong { color: var(--right); }
article.wrong strong { color: var(--wrong); }
@media (max-width: 40rem) { body { padding: 0.5rem 0.75rem 3rem; } th .text { min-width: 7rem; } }
@media print { body { max-width: none; font-size: 10pt; padding: 0; } .wide { overflow: visible; }
  table { font-size: 7pt; } th, td { padding: 0.15rem 0.3rem; } tbody th { position: static; }
  tr, figure, article { break-inside: avoid; } h2, h3 { break-after: avoid; } }
"""
