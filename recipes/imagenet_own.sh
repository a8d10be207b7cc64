# Photographs of your own: all below train/<class>/ are labelled; a ViT-S/16 learns from all of them, unless --encoder
# names one.

config=own recipe_labels=0
msn=(--model=deit_small --epochs=200 --batch_size=256)
