recipe_labels=400 config_labels=400
learner_flags=(--num_classes=100 --widen_factor=8 --weight_decay=0.001)
labelled=150 unlabelled=300 imbalance_default=10
