"""From a budget to a plan: which sync points go, and how what is lost is recovered."""
