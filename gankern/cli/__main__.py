from gankern.cli import main

main()
