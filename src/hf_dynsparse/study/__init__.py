"""Studies of many runs: plan, results, pictures, report. What `examples/pareto_study.py` is made of."""
