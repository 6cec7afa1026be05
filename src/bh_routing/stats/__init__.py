"""Pure mathematics: the statistic, its null distributions, p-values and multiple-testing procedures."""
