from g4kit.main import main

main()
