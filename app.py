"""The page in the browser, for hosts that start a file: `python app.py`. `gensparse app` has options."""

import os

from gensparse.app import Settings, serve

if __name__ == "__main__":
    port = os.environ.get("PORT")
    serve(Settings(port=int(port) if port else 7860))
