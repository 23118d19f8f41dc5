"""One folder, one job, one entry point each. They import `supervisor` and never each other."""
