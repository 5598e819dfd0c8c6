"""The narrow waist: the records that stages hand to each other, and the arithmetic on them."""
