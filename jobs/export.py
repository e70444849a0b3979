from _launch import launch

if __name__ == "__main__":
    launch("export")
