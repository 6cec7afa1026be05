"""From a statistic and a table to kept slots and their weights."""
