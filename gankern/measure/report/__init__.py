"""What `gankern bench` recorded, for people: tables, pictures, one page, and the comparison of two records."""
