--- @include lib/ending/watch_deadline
--- @include lib/failure/push
--- @include lib/queue/ring

-- To the front of its queue: it has waited its turn already.
local function to_front(queue, id)
  push('LPUSH', queue, id)
  watch_deadline(queue, id)
  ring(queue)
end
