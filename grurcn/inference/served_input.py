"""What a served model takes: the columns of a request and its parameters."""

# The columns: a file that the server sees, or the bytes of one. A request has one of them, as MLflow decodes no bytes that only
# some rows have.
PATH, VIDEO = "path", "video"
PARAMETERS = {"clips": 10, "views": 1, "top": 5}  # with their defaults
