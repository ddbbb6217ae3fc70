"""The words of the attention tab, each in a sentence or two."""

GLOSSARY = """
- **Token**: a word or a piece of one; what a model reads and writes.
- **Layer, head**: a model changes its picture of the text layer by layer; in each, several heads look at earlier
  tokens, each for its own reasons.
- **Query, key, value**: what a token asks, what every earlier token answers to, and what it hands over when it is
  read.
- **Softmax attention**: the query is compared with every earlier key; the better the match, the more of that value is
  taken.
- **Attention map**: row i, column j: the weight with which token i reads token j. Nothing above the diagonal: that is
  later.
- **Base, variant**: a pretrained model, and the same model with another attention, fitted to predict what the base
  predicts.
- **Masks**: only a few places are read. *last(i)*: exactly i tokens back. *window(w)*: the latest w. *first(k)*: the
  first k. *dilated(w, s)*: w places, s apart. *top(n)*: the n tokens with the highest learned scores. *induction(n)*:
  what followed this token before.
- **Performer**: keys become features (positive numbers), and all values are added up into one summary, weighed by
  them; a query reads the summary. With a **window**, the latest tokens are read one by one as well.
- **Native sparse attention (nsa)**: three **branches**, mixed by **gates**: *compressed* reads a summary of each
  block of tokens, *selected* reads a few whole blocks, *window* the latest tokens.
- **Gate**: a number between 0 and 1 that a head makes from the token itself: how much a branch counts.
- **Induction**: looking for what followed the last time this token occurred.
- **First tokens (sinks)**: heads that have nothing to look for tend to look there.
- **Total variation**: the part of the attention that lies elsewhere: 0 for the same, 1 for no token in common.
- **Running mean**: what a head would hand over that reads all tokens so far alike.
- **Keys scored**: what is gone through to choose the keys that are read; it costs time too.
- **KL**: how far a model's word on the next token is from the base's, in nats; 0 is the same. **Perplexity**: how
  many tokens the model is, so to speak, undecided between; lower is better.
- **Reach**: the tokens that change a prediction when they are changed themselves.
"""
