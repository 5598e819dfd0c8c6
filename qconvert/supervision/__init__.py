"""One process that watches another, which runs plugins: it may crash or hang, and the user is told in what."""
