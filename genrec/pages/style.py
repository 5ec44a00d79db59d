"""The style sheet of the report. Series colours: Okabe and Ito's, apart for every kind of colour vision."""

CSS = """
:root { color-scheme: light dark; --page: #f5f6f8; --card: #ffffff; --ink: #16191d; --muted: #5a626c; --grid: #dfe3e8;
  --series-0: #0072b2; --series-1: #d55e00; --series-2: #009e73; --series-3: #cc79a7; --series-4: #e69f00;
  --series-5: #56b4e9; --tint: #e6f1f8; }
@media (prefers-color-scheme: dark) { :root { --page: #101317; --card: #191d23; --ink: #eceff3; --muted: #a0a9b4;
  --grid: #363d46; --series-0: #4fb0ea; --series-1: #f28c4a; --series-2: #35c79c; --series-3: #e3a1c4;
  --series-4: #f0b840; --series-5: #8ccbf2; --tint: #1c2f3d; } }
@media print { :root { --page: #fff; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "DejaVu Sans", sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 40px 20px 64px; }
h1 { font-size: clamp(1.6rem, 5vw, 2.3rem); line-height: 1.15; margin: 0 0 12px; letter-spacing: -0.02em; }
h2 { font-size: 1.25rem; margin: 44px 0 14px; letter-spacing: -0.01em; }
h3 { font-size: 1rem; margin: 0 0 10px; }
h4 { font-size: .8rem; font-weight: 500; margin: 0 0 6px; color: var(--muted); }
.lead { font-size: 1.1rem; max-width: 46em; margin: 0 0 22px; }
.note { color: var(--muted); font-size: .85rem; margin: 10px 0 0; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 14px; }
.tile, .card { background: var(--card); border: 1px solid var(--grid); border-radius: 12px; padding: 18px 20px; }
.tile b { display: block; font-size: 1.5rem; line-height: 1.25; font-variant-numeric: tabular-nums; }
.tile span { color: var(--muted); font-size: .85rem; }
.ahead { color: var(--series-0); } .behind { color: var(--series-1); } .within { color: var(--muted); }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); gap: 16px;
  align-items: start; }
.stack { display: grid; gap: 16px; }
.wide { grid-column: 1 / -1; }
.card { margin: 0; min-width: 0; break-inside: avoid; }
svg { display: block; width: 100%; height: auto; max-width: 560px; margin: 0 auto; }
figure.wide svg { max-width: 100%; }
svg text { font-variant-numeric: tabular-nums; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; white-space: nowrap; }
th, td { padding: 8px 10px; text-align: right; border-bottom: 1px solid var(--grid); font-weight: 400; }
th:first-child { text-align: left; padding-left: 0; }
th[colspan] { border-bottom: 0; padding-bottom: 0; text-align: center; }
thead tr:first-child th:first-child { border-bottom: 0; }
thead th { color: var(--muted); font-size: .85rem; }
tbody tr:first-child th { font-weight: 650; }
tbody tr:last-child > * { border-bottom: 0; }
.best { font-weight: 700; }
.dense { font-size: .8rem; } .dense th, .dense td { padding: 4px 8px; }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 320px), 1fr)); gap: 14px 36px; }
ul, ol { margin: 0; padding: 0; list-style: none; counter-reset: place; }
li { display: flex; gap: 12px; justify-content: space-between; align-items: baseline; padding: 5px 0;
  border-bottom: 1px solid var(--grid); overflow-wrap: anywhere; }
li:last-child { border-bottom: 0; }
ol li { counter-increment: place; }
ol li > span:first-child { flex: 1; padding-left: 1.9em; text-indent: -1.9em; }
ol li > span:first-child::before { content: counter(place); display: inline-block; width: 1.9em; text-indent: 0;
  color: var(--muted); font-variant-numeric: tabular-nums; }
.hit { background: var(--tint); border-radius: 6px; box-shadow: 0 0 0 6px var(--tint);
  border-bottom-color: transparent; }
.hit em { font-style: normal; font-size: .75rem; font-weight: 600; color: var(--series-0); margin-left: 8px;
  white-space: nowrap; }
.rating { color: var(--muted); white-space: nowrap; font-variant-numeric: tabular-nums; }
.score { display: grid; grid-template-columns: 44px 46px; align-items: center; flex: none; text-align: right;
  color: var(--muted); font-size: .85rem; font-variant-numeric: tabular-nums; }
.score i { height: 6px; border-radius: 3px; background: var(--series-0); opacity: .75; }
dl { display: grid; grid-template-columns: auto 1fr; gap: 4px 18px; margin: 0; }
dt { color: var(--muted); } dd { margin: 0; text-align: right; overflow-wrap: anywhere;
  font-variant-numeric: tabular-nums; }
pre { margin: 0; overflow-x: auto; font: .85rem/1.6 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace;
  white-space: pre-wrap;
  overflow-wrap: anywhere; }
@media (max-width: 520px) { main { padding: 24px 14px 48px; } .card, .tile { padding: 14px; }
  h2 { margin-top: 32px; } .tile b { font-size: 1.25rem; } table, thead th { font-size: .72rem; }
  th, td { padding: 7px 2px; } tbody th { white-space: normal; } }
@media print { main { max-width: none; padding: 0; } .card, .tile { border-color: #ccc; }
  .scroll { overflow: visible; }
  table { font-size: 9pt; } section { break-inside: auto; } }
"""
