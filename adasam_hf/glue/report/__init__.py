"""The report on the records of sweeps: tables, figures, and a verdict on each claim of the paper.

`records` reads records into grids; `statistics` has intervals, tests and power; `curves` has the loss curves, `choices`
what the trials chose, `claims` the verdicts and their rules, `differences` the comparisons within other sweeps;
`tables`, `plots` and `page` (with its template page.md.jinja) write the page; `command` and `power` are command lines.
"""
