# scikit-learn's handwritten digits at 32x32, one label a class, minutes on a CPU: real code paths, tiny networks.

config=digits recipe_labels=1
msn=(--img_size=32 --patch_size=8 --embed_dim=64 --depth=3 --num_heads=4 --hidden=256 --output_dim=64 --prototypes=40
     --focal_views=1 --focal_size=24 --area=0.6 --mask=0.2 --flip=no --epochs=80 --warmup=4 --batch_size=128 --lr=0.003
     --final_weight_decay=0.04 --momentum=0.98 --save_seconds=20)
one_thread=1
