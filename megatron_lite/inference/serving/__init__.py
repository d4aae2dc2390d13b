"""A trained model behind OpenAI's HTTP interface, for many clients at once, and a page to chat with.

    HTTP, asyncio            app.py ─▶ asked.py (what is wanted) ─▶ model_thread.py ─▶ answers.py
    the model's own thread                                          inference/generate.py RunningBatch
    other ranks of tp and pp            orders.py: they follow rank 0, step by step

Imports config, data and the rest of inference; FastAPI and uvicorn, the extra `serve`, in app.py
and server.py alone.  Begin with model_thread.py: all that HTTP knows of the model is a job.
"""
