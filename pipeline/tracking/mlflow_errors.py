"""Say why MLflow's store fails, and what to do.

MLflow and the libraries below it put all causes into texts, often without a status, so that the text tells them apart.
"""

import re

from pipeline.system.errors import first_line

ADDRESS = "correct MLFLOW_TRACKING_URI"
LOG = "see the log of the server, and of a proxy before it"
# The first pattern that the error's text has decides: pattern, cause (empty: the error's first line), what to do.
CAUSES = tuple((re.compile(pattern, re.IGNORECASE), cause, remedy) for pattern, cause, remedy in (
    # answers of a server, or of something before it
    (r"too many (\d+) error responses", r"HTTP status \1", LOG),
    ("error code 401|401 Client Error|UNAUTHENTICATED|CUSTOMER_UNAUTHORIZED", "it requires a login or refuses this one",
     "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"),
    ("Invalid Host header", "it does not answer to this host name",
     "name it in `mlflow server --allowed-hosts`"),
    ("^PERMISSION_DENIED", "", "ask for permission, or use another account"),
    ("error code 403|403 Client Error", "this account has no permission (403)",
     "ask for permission, or use another account: MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"),
    ("^FEATURE_DISABLED|^ENDPOINT_NOT_FOUND", "", "use an MLflow 3 server with a database"),
    (r"(registered-models|model-versions)\S* failed with error code (404|405|501)|^\w+: +Model registry functionality",
     "it has no model registry", "use an MLflow 3 server with a database"),
    (r"logged-models\S* failed with error code (404|405|501)", "it is older than MLflow 3",
     "update it, or name another server"),
    (r"error code (404|405)", r"there is no MLflow at this address (\1)", ADDRESS),
    (r"error code (\d+)|(\d+) (?:Client|Server) Error", r"HTTP status \1\2", LOG),
    ("^INTERNAL_ERROR: Response: (.*)", r"its answer is not one of MLflow: \1",
     f"{ADDRESS}, or set MLFLOW_TRACKING_TOKEN if it requires a login"),
    ("valid JSON format|answers are not those of MLflow|Exceeded \\d+ redirects",
     "its answers are not those of MLflow, but of a proxy, a login page or another program",
     f"{ADDRESS}: opened in a browser, it must show MLflow without a login"),
    # on the way to a server
    ("ProxyError", "the proxy does not let the request through", "correct HTTP_PROXY, HTTPS_PROXY or NO_PROXY"),
    ("Failed to resolve|Name or service not known|nodename nor servname|No address associated",
     "its host name is unknown", f"{ADDRESS}, or repair the network's DNS"),
    (r"certificate verify failed: ([^(]*?) *\(", r"its TLS certificate is refused: \1",
     "use the host name for which it was issued, or set MLFLOW_TRACKING_SERVER_CERT_PATH to the certificate of its CA"),
    (r"wrong.version.number|record.layer.failure", "it does not use TLS", "write http instead of https"),
    (r"SSLError\(\d*,? *'([^(]*?) *\(", r"TLS fails: \1", f"{ADDRESS}; {LOG}"),
    (r"""(?:host='|server at ")([^'"]*)['"], port[= ](\d+).*Connection refused""", r"connection refused by \1:\2",
     f"start it, or {ADDRESS}, or unset it"),
    (r'on socket "([^"]*)" failed', r"no server at \1", f"start it, or {ADDRESS}"),
    ("timed? ?out", "no answer in time", f"check the network; {LOG}"),
    (r"New ?Connection ?Error.*\[Errno -?\d+\] ([\w ]+)", r"\1", f"{ADDRESS}, or check the network"),
    ("Connection aborted|IncompleteRead|ChunkedEncoding", "the connection ends without an answer",
     f"write https instead of http if it uses TLS; {LOG}"),
    (r"invalid path: (\S+)", r"there is no certificate \1",
     "correct MLFLOW_TRACKING_SERVER_CERT_PATH or REQUESTS_CA_BUNDLE"),
    ("dependencies for SOCKS", "the Python package PySocks is missing", "`pip install PySocks`, or use another proxy"),
    ("failed with exception (.*)", r"\1", f"{ADDRESS}, or check the network"),
    # what MLFLOW_TRACKING_URI may be
    ("got unsupported URI|Invalid url|Unity Catalog|Could not parse|Invalid SQLite URL|Can't load plugin",
     "MLflow has no such stores", f"{ADDRESS} to http://HOST:PORT or sqlite:///FILE"),
    ("No module named 'psycopg", "PostgreSQL's driver is missing", "`make install EXTRAS=postgres`"),
    ("No module named '([^']*)'", r"the Python package \1 is missing", "install it"),
    # databases and files
    ("file is not a database|malformed", "", "`python -m pipeline doctor` says what to do"),
    ("unable to open database file|File exists|Not a directory", "",
     "check that its folder exists and that you may write there"),
    ("readonly database|Permission denied|InsufficientPrivilege", "", "get permission to write, or name another store"),
    ("database is locked", "another program has locked the database", "stop that program, such as `mlflow ui`"),
    ("disk is full|No space left", "its disk is full", "free disk space"),
    (r'password authentication|no password|role "\S*" does not exist', "the database refuses the login",
     "write user and password to ~/.pgpass"),
    (r'database "([^"]*)" does not exist', r"there is no database \1", r"create it, or correct MLFLOW_TRACKING_URI"),
))  # fmt: skip


def explain(error: BaseException) -> tuple[str, str | None]:
    """The cause of an error in a few words, and what to do; None if the cause is not known."""
    text = first_line(error)
    for pattern, cause, remedy in CAUSES:
        if found := pattern.search(text):
            return found.expand(cause) or text, remedy
    return text, None
