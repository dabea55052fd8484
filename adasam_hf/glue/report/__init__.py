"""The report on the records of sweeps: tables, pictures, and a verdict on each claim of the paper.

`records` reads them into grids, `statistics` has intervals, tests and power, `curves` the loss curves, `choices` what
the trials chose, `claims` the verdicts and their rules, `differences` what is shown of other sweeps; `tables`, `plots`
and `page` (with its template page.md.jinja) write it down; `command` and `power` are command lines.
"""
