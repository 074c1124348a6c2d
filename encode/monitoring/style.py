"""How the page of a snapshot looks, in light and in dark."""

STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1c2127; --soft: #646d78; --rule: #dde1e6;
  --now: #4878a8; --before: #c2581b; --good: #2f7d4f; --bad: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --paper: #15181c; --ink: #e4e7eb; --soft: #98a2ad;
  --rule: #323941; --now: #6f9fce; --before: #f0965a; --good: #6cc08b; --bad: #f2877f; } }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 24px; }
h1 { font-size: 24px; margin: 0; }
h2 { font-size: 17px; margin: 28px 0 6px; }
p { margin: 4px 0 10px; }
.note, .tiles span { color: var(--soft); font-size: 13px; }
code { font-size: 13px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin: 18px 0; }
.tiles div { border-top: 2px solid var(--rule); padding-top: 6px; }
.tiles b { display: block; font-size: 20px; font-weight: 600; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(300px, 100%), 1fr)); gap: 18px; }
svg { width: 100%; }
svg text { fill: var(--ink); font-size: 11px; }
svg .title { font-size: 12px; font-weight: 600; }
svg .tick { fill: var(--soft); font-size: 10px; text-anchor: middle; }
svg .end { text-anchor: end; }
svg .now { fill: var(--now); }
svg .before { stroke: var(--before); stroke-width: 2; }
svg .axis { stroke: var(--rule); }
table { border-collapse: collapse; font-size: 14px; }
th { color: var(--soft); font-weight: 500; text-align: left; }
th, td { border-bottom: 1px solid var(--rule); padding: 4px 14px 4px 0; vertical-align: top; }
.number { font-variant-numeric: tabular-nums; text-align: right; }
.date { white-space: nowrap; }
.none { color: var(--good); }
.some { color: var(--before); }
.much { color: var(--bad); font-weight: 600; }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(480px, 100%), 1fr)); gap: 0 32px; }
h3 { font-size: 14px; margin: 14px 0 4px; }
ul { margin: 4px 0; padding-left: 20px; }
.key { display: inline-block; width: 14px; height: 10px; margin-right: 4px; background: var(--now); }
.key.line { height: 2px; background: var(--before); vertical-align: middle; }
@media (max-width: 1000px) { section, .columns > * { min-width: 0; overflow-x: auto; } }
@media (max-width: 600px) { main { padding: 12px; } th, td { padding-right: 8px; } }
"""
