"""Results for people and for other tools: terminal tables, HTML pages, Markdown, SARIF."""
