"""A page that shows a pool: what the commands show, live, in a browser."""
