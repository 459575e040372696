"""The report: results as HTML and Markdown, figures, single rows."""
