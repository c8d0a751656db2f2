"""The style sheet of the evaluation report and the legend of its gallery.

System fonts, numbers of one width, colours by name for light and dark mode. Blue and orange are Okabe and Ito's: told
apart with every common colour blindness, and on any picture thanks to a pale or dark halo.
"""

STYLE = """\
:root { color-scheme: light dark; --page: #fff; --text: #1c2024; --quiet: #5f6a75; --line: #dfe3e8; --soft: #f4f6f8;
  --value: #0072b2; --bound: #c3cad2; --warning: #8a2d00; --warning-page: #fff0e6; }
@media (prefers-color-scheme: dark) { :root { --page: #14171a; --text: #e6e9ec; --quiet: #9aa5b0; --line: #30363d;
  --soft: #1c2126; --value: #56b4e9; --bound: #4a545e; --warning: #ffb68a; --warning-page: #3a2013; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text); font: 16px/1.5 system-ui, -apple-system, "Segoe UI",
  Roboto, "Helvetica Neue", "Noto Sans", Arial, sans-serif; font-variant-numeric: tabular-nums; }
main { max-width: 1120px; margin: 0 auto; padding: 2rem 1rem 4rem; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 .75rem; letter-spacing: -.01em; }
h2 { font-size: 1.2rem; line-height: 1.3; margin: 2.5rem 0 .75rem; }
h3 { font-size: 1rem; margin: 1.5rem 0 .5rem; }
p, ul { margin: .5rem 0; max-width: 46rem; }
h1, h2, p, li, dd { overflow-wrap: anywhere; }
ul { padding-left: 1.25rem; }
.quiet { color: var(--quiet); font-size: .875rem; font-weight: 400; }
.warning { background: var(--warning-page); color: var(--warning); border-left: 4px solid currentColor;
  padding: .75rem 1rem; border-radius: 0 4px 4px 0; font-size: 1.1rem; }
.mark { color: var(--warning); background: var(--warning-page); border-radius: 4px; padding: .1rem .5rem;
  font-size: .8rem; vertical-align: middle; }
dl { margin: 1rem 0; }
dl div { padding: .3rem 0; border-top: 1px solid var(--line); min-width: 0; }
dt { color: var(--quiet); font-size: .8rem; }
dd { margin: 0; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(15rem, 1fr)); gap: 0 2rem; }
.settings div { display: grid; grid-template-columns: minmax(7rem, 14rem) 1fr; gap: 1rem; font-size: .875rem; }
details { margin-top: 2.5rem; }
summary { font-weight: 650; cursor: pointer; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .875rem; width: 100%; }
table.narrow { width: auto; }
th, td { padding: .45rem .6rem; text-align: right; vertical-align: top; border-bottom: 1px solid var(--line); }
thead th { vertical-align: bottom; color: var(--quiet); font-weight: 500; border-bottom-color: var(--quiet); }
th:first-child { text-align: left; position: sticky; left: 0; background: var(--page); padding-left: 0;
  min-width: 6.5rem; }
tbody th { font-weight: 500; }
td { white-space: nowrap; }
.interval { display: block; color: var(--quiet); font-size: .75rem; }
tr.model td, tr.model th { background: var(--soft); font-weight: 650; }
tr.model th:first-child { box-shadow: inset 3px 0 var(--value); padding-left: .6rem; }
tr.model .interval { font-weight: 400; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); gap: 1.5rem 2.5rem; }
.chart { width: 100%; max-width: 34rem; height: auto; }
svg text { font-size: 12px; fill: var(--text); font-family: inherit; }
svg .end { text-anchor: end; }
svg .middle { text-anchor: middle; }
svg .quiet { fill: var(--quiet); font-size: 11px; }
svg .strong { font-weight: 650; }
svg .chart-title { font-size: 13px; font-weight: 650; }
.grid { stroke: var(--line); }
.bar-value { fill: var(--value); }
.bar-bound { fill: var(--bound); }
.legend { display: flex; flex-wrap: wrap; gap: .25rem 1.5rem; font-size: .875rem; }
.legend span { display: inline-flex; align-items: center; gap: .5rem; }
.swatch { width: 1.5rem; height: .875rem; overflow: visible; }
.cases { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 15.5rem), 1fr)); gap: 1.5rem 1rem; }
figure { margin: 0; min-width: 0; }
figcaption { font-size: .875rem; line-height: 1.4; }
figcaption p { margin: .25rem 0; }
.case { display: block; width: 100%; height: auto; background: var(--soft); border-radius: 3px; }
.blank { fill: var(--soft); }
.wanted rect, .detected rect { fill: none; }
.wanted rect { stroke: #0072b2; stroke-width: 2.5; }
.wanted .halo { stroke: #fff; stroke-width: 5; stroke-opacity: .75; }
.detected rect { stroke: #e69f00; stroke-width: 2.25; stroke-dasharray: 6 4; }
.detected .halo { stroke: #000; stroke-width: 3.5; stroke-opacity: .5; }
.wanted-label rect { fill: #0072b2; }
.detected-label rect { fill: #e69f00; }
svg .wanted-label text, svg .detected-label text { font-size: 11px; fill: #fff; }
svg .detected-label text { fill: #000; }
@media print { .scroll { overflow: visible; } figure, .chart { break-inside: avoid; } }
"""

LEGEND = (
    '<p class="legend">'
    '<span><svg class="swatch" viewBox="0 0 24 14" aria-hidden="true"><g class="wanted">'
    '<rect x="2" y="1" width="20" height="12"/></g></svg> wanted (solid blue)</span>'
    '<span><svg class="swatch" viewBox="0 0 24 14" aria-hidden="true"><g class="detected">'
    '<rect class="halo" x="2" y="1" width="20" height="12"/><rect x="2" y="1" width="20" height="12"/></g></svg>'
    " detected, with its score (dashed orange)</span></p>"
)
