"""What nodes measured: rows as they report them, tables of rows, and whether they suffice for a fit."""
