"""Is it right, is it fast, and why not: cases, verification, benchmark, whole steps, and the report on them."""
