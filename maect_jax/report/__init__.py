"""The report of a run, `report.html`, and contact sheets of a config's views."""
