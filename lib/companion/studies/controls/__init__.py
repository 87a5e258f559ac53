"""07: flow or training?"""
