"""A sweep on one page: `page` as self-contained HTML, `summary_plots` as pictures beside its parent run in MLflow.

content.py       what the page says: methods, winner, cost, savings, environment
plots.py         figures that show methods: curves, sharpness
space_plots.py   figures that show the space: rho x lam, parallel coordinates, all trials
page.py          both in page.html, with page.css and page.js
pictures.py      the main figures by matplotlib
"""

from __future__ import annotations

from ray_jobs.report.page import SCRIPT, page, plotly
from ray_jobs.report.pictures import summary_plots

__all__ = ["SCRIPT", "page", "plotly", "summary_plots"]
