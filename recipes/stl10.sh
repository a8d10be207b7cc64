shape=-96x96
learner_flags=(--net=WideResNetVar)
