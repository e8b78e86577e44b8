"""One page for one or several runs: `collect.py` reads their folders, `write.py` puts it into the page."""
